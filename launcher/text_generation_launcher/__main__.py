"""`python -m text_generation_launcher`."""

from text_generation_launcher.cli import main

if __name__ == "__main__":
    main()
