"""``text-generation-server``: one shard, or the download of a model."""

from __future__ import annotations

from text_generation_proto.lifeline import hold_lifeline


def main() -> None:
    hold_lifeline()
    from text_generation_server.cli import app

    app()


if __name__ == "__main__":
    main()
