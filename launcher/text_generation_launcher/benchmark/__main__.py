"""`text-generation-benchmark`, and `python -m text_generation_launcher.benchmark`."""

from text_generation_launcher.benchmark.cli import NAME, app


def main() -> None:
    app(prog_name=NAME)


if __name__ == "__main__":
    main()
