"""Times of the sandboxes: starting, a plain call, calls with the libraries, a call in a session.

    python benchmarks/sandbox.py --out benchmarks/sandbox.json

Milliseconds by the clock: median, lower and upper quartile. What does not work here is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spear_lightning.sandbox import BubblewrapSandbox, MontySandbox, Sandbox, SandboxError, Session

PLAIN = "print(1)"
SNIPPETS = {
    "plain": PLAIN,
    "loop of 100 000": "s = 0\nfor i in range(100000):\n    s += i * i\nprint(s)",
    "numpy": "import numpy as np\nprint(np.linalg.det(np.arange(9.0).reshape(3, 3)))",
    "sympy, solve": "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))",
    "sympy, integrate and simplify": (
        "from sympy import *\nx = symbols('x')\nprint(integrate(sin(x) * exp(x), x), simplify(sin(x)**2 + cos(x)**2))"
    ),
    "exception": "1 / 0",
}


def quartiles(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": _ms(middle), "q1_ms": _ms(low), "q3_ms": _ms(high), "n": len(seconds)}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def timed(action: Callable[[], Any], repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return quartiles(seconds)


def measure_start(make: Callable[[], Sandbox], repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        sandbox = make()
        started = time.perf_counter()
        sandbox.open()
        seconds.append(time.perf_counter() - started)
        sandbox.close()
    return quartiles(seconds)


def measure_session(sandbox: Sandbox, calls: int, repeats: int) -> dict[str, dict[str, float]]:
    first, later = [], []
    for _ in range(repeats):
        session: Session
        with sandbox.session() as session:
            durations = [session.run(PLAIN).seconds for _ in range(1 + calls)]
        first.append(durations[0])
        later += durations[1:]
    return {"first call": quartiles(first), "later call": quartiles(later)}


def measure(make: Callable[[bool], Sandbox], repeats: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {
            "start": measure_start(lambda: make(False), 5),
            "start with self-test": measure_start(lambda: make(True), 5),
        }
    except SandboxError as error:
        return {"not measured": str(error)}
    with make(False) as sandbox:
        calls = {}
        for name, code in SNIPPETS.items():
            result = sandbox.run(code)
            if result.error and name != "exception":
                calls[name] = {"not measured": result.error.splitlines()[-1]}
                continue
            calls[name] = timed(lambda code=code: sandbox.run(code), repeats)
        return {**found, "call": calls, "session": measure_session(sandbox, 10, max(4, repeats // 10))}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write; without it, the result is printed")
    parser.add_argument("--repeats", type=int, default=100, help="calls of each snippet")
    options = parser.parse_args()
    result = {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "python": platform.python_version(),
            "kernel": platform.release().split("-")[0],
            "root": os.geteuid() == 0,
        },
        "repeats": options.repeats,
        "bubblewrap": measure(lambda test: BubblewrapSandbox(self_test=test), options.repeats),
        "monty": measure(lambda test: MontySandbox(self_test=test), options.repeats),
    }
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
