"""`python -m pixrl` is `pixrl`."""

from pixrl.cli import main

if __name__ == "__main__":
    main()
