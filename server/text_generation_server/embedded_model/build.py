"""Makes the embedded model: `python -m text_generation_server.embedded_model.build --output DIR`.

Everything is generated and seeded, nothing is downloaded. Two CPU cores take an hour; an accelerator is used if there
is one, and takes minutes for the same number of `--steps`. On a CPU that others use too, set `OMP_WAIT_POLICY=PASSIVE`:
threads that spin while they wait for one another make a step ten times as long there. A build that was interrupted goes
on from its last checkpoint when the same command is given again.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from text_generation_server.embedded_model import embedded_model_path
from text_generation_server.embedded_model.recipe.corpus import HELD_OUT, first
from text_generation_server.embedded_model.recipe.evaluation import Evaluator
from text_generation_server.embedded_model.recipe.model_card import Measured, write_model_card
from text_generation_server.embedded_model.recipe.tokenizer import TOKENIZER_CONFIG, train_tokenizer
from text_generation_server.embedded_model.recipe.training import Budget, load_model, new_model, quick_scores, train

TOKENIZER_SEED = 1
TOKENIZER_EXAMPLES = 60_000
STATE_FILE = "training.pt"
"""In the output folder while training is not at its end; the same command then goes on from it."""


def main() -> None:
    arguments = _parse()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    if arguments.continue_from is None:
        tokenizer = train_tokenizer(e.prompt + e.answer for e in first(TOKENIZER_EXAMPLES, TOKENIZER_SEED))
        model = new_model(arguments.seed)
    else:
        tokenizer = Tokenizer.from_file(str(arguments.continue_from / "tokenizer.json"))
        model = load_model(arguments.continue_from)
    save_tokenizer(tokenizer, output)
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters on {device}", flush=True)
    steps, seconds = 0, 0.0
    budget = Budget(arguments.steps, arguments.minutes)
    checkpoints = train(
        model,
        tokenizer,
        seed=arguments.seed,
        budget=budget,
        learning_rate=arguments.learning_rate,
        report_every_s=arguments.report_every,
        state_file=output / STATE_FILE,
    )
    for step, spent_s in checkpoints:
        steps, seconds = step, spent_s
        for name, score in quick_scores(model, tokenizer, list(HELD_OUT), count=100).items():
            print(f"    {score:7.1%}  {name}", flush=True)
        save_model(model, output)

    scores = Evaluator(output).scores(arguments.examples_per_set)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    measured = Measured(
        scores, arguments.examples_per_set, parameters, steps, seconds / 60, arguments.seed, where, arguments.remark
    )
    write_model_card(output, measured)
    (output / STATE_FILE).unlink()
    for name, score in scores.items():
        print(f"{score:7.1%}  {name}")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer, its configuration and the chat template, which is written by hand and lives in `files/`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")
    template = embedded_model_path() / "chat_template.jinja"
    if folder.resolve() != template.parent.resolve():
        shutil.copy(template, folder)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write weights, `config.json` and `generation_config.json`; each file is whole at any time."""
    partial = folder / ".partial"
    model.save_pretrained(partial)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model's folder, made if need be")
    parser.add_argument(
        "--minutes", type=float, default=60, help="wall time of the training; the default is %(default)s"
    )
    parser.add_argument(
        "--steps", type=int, help="train so many steps, however long they take; only this is reproducible"
    )
    parser.add_argument("--continue-from", type=Path, help="a model folder to start from, with its tokenizer")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="at its height; the default is %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remark", default="", help="a sentence for the model card, on an earlier run say")
    parser.add_argument("--report-every", type=float, default=180, help="seconds between checkpoints with quick scores")
    parser.add_argument("--examples-per-set", type=int, default=300, help="examples in each row of the model card")
    return parser.parse_args()


if __name__ == "__main__":
    main()
