"""`python -m edgeft` is `edgeft`."""

from edgeft.cli import main

if __name__ == "__main__":
    main()
