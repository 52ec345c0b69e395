from __future__ import annotations

from spear_lightning.metrics.csv_logger import MetricsCSV


def test_a_resumed_run_reads_as_if_it_had_never_stopped(tmp_path):
    logger = MetricsCSV(str(tmp_path))
    for iteration in range(4):
        logger.log_metrics({"success": iteration / 10}, step=iteration)
    resumed = MetricsCSV(str(tmp_path))
    resumed.log_metrics({"success": 0.2, "late": 1.0}, step=2)
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "iteration,late,success",
        "0,,0.0",
        "1,,0.1",
        "2,1.0,0.2",
    ]
