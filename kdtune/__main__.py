"""`python -m kdtune` is `kdtune`."""

from kdtune.cli.main import main

if __name__ == "__main__":
    main()
