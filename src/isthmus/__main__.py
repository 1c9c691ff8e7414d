"""`python -m isthmus` is the command `isthmus`, for launchers such as torchrun that start modules."""

from isthmus.cli.app import main

if __name__ == "__main__":
    main()
