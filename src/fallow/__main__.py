"""``python -m fallow``."""

from fallow.cli import main

if __name__ == "__main__":
    main()
