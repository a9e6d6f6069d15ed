"""``python -m bigdl`` is the ``bigdl`` command."""

from bigdl.nano.cli import main

if __name__ == "__main__":
    main()
