"""`python -m smolforge`, which is what torchrun starts."""

from smolforge.cli import main

if __name__ == "__main__":
    main()
