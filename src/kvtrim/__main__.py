"""`python -m kvtrim` is `kvtrim`."""

from kvtrim.cli import main

if __name__ == "__main__":
    main()
