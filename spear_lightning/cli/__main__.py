"""``python -m spear_lightning.cli``."""

from spear_lightning.cli.main import main

if __name__ == "__main__":
    main()
