"""``python -m aiokvm`` is the command line."""

from aiokvm.cli import main

if __name__ == "__main__":
    main()
