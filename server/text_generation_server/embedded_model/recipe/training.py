"""Trains the model: Llama architecture, bf16 weights with float32 masters, loss on the answers alone.

Rows of like length are padded into batches, and all batches of a step go through the model as one sequence: its linear
layers are far faster so, and attention takes the sequence apart again.

Shapes: B rows of a batch, T tokens of the longest row, P positions of the sequence, N answer tokens of it; H query
heads, G key-value heads, R query heads to each of those, D values of a head or of a hidden state.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

from text_generation_server.embedded_model.recipe.corpus import EXAMPLES_PER_STEP, held_out, stream
from text_generation_server.embedded_model.recipe.example import Example
from text_generation_server.embedded_model.recipe.tokenizer import VOCAB_SIZE

MAX_POSITIONS = 2048
END_IDS = (2, 0)
"""`<|im_end|>` ends a chat turn, `<|endoftext|>` a plain completion."""

TURN_ID = 1
"""`<|im_start|>`."""

SHORTEST_IN_BATCH = 0.8
"""Of its longest row."""

AVERAGE_DECAY = 0.97
WARM_UP = 0.02
DECAY_FROM = 0.4
"""Parts of the run: the learning rate rises, stays, and falls in a line to zero from here on."""


@dataclass(frozen=True, slots=True)
class Row:
    """An example as token ids; the answer begins at `start`."""

    ids: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: a number of steps, or else minutes of wall time."""

    steps: int | None
    minutes: float

    def progress(self, step: int, started: float) -> float:
        """The part of the run that is over, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, (time.monotonic() - started) / (60 * self.minutes))


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained model in bf16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        attn_implementation=ATTENTION,
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=list(END_IDS),
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=list(END_IDS), pad_token_id=0)
    for parameter in model.parameters():  # not `model.to`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def load_model(folder: Path) -> LlamaForCausalLM:
    """A model that was trained before, to be trained on."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=ATTENTION)


def encode(tokenizer: Tokenizer, examples: list[Example], rng: random.Random) -> list[Row]:
    """Token ids of examples. A plain prompt mostly begins with BOS and a chat mostly does not; both bear the other."""
    prompts = tokenizer.encode_batch_fast([e.prompt for e in examples], add_special_tokens=False)
    answers = tokenizer.encode_batch_fast([e.answer for e in examples], add_special_tokens=False)
    rows = []
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        begins = rng.random() < (0.1 if example.prompt.startswith("<|im_start|>") else 0.85)
        ids = [0, *prompt.ids] if begins else prompt.ids
        rows.append(Row(ids + answer.ids, len(ids)))
    return rows


def batches(rows: list[Row]) -> list[list[Row]]:
    """Rows of like length together."""
    found: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if not found or len(row.ids) < SHORTEST_IN_BATCH * len(found[-1][0].ids):
            found.append([])
        found[-1].append(row)
    return found


@dataclass(frozen=True, slots=True)
class Sequence:
    """Batches behind one another, each `B * T` positions; rows are padded on the right, where no row looks."""

    shapes: list[tuple[int, int]]
    """B and T of each batch."""

    ids_P: Tensor
    positions_P: Tensor
    answers_N: Tensor
    """Where in the sequence the answer tokens are."""

    rows_N: Tensor
    """The row of each answer token, counted over all batches."""

    weights_N: Tensor
    """The inverse root of the length of each one's answer."""


def packed(rows: list[Row], rng: random.Random | None) -> Sequence:
    """The rows as a sequence. With `rng`, every fourth row's positions jump before one of its turns.

    So the model learns far turns at the price of short prompts. Source: PoSE, Zhu et al. 2023.
    """
    shapes, ids, positions, answers, numbers, weights = [], [], [], [], [], []
    begin = number = 0
    for batch in batches(rows):
        longest = len(batch[0].ids)
        shapes.append((len(batch), longest))
        for row in batch:
            end = len(row.ids)
            ids.append(torch.tensor(row.ids + [0] * (longest - end)))
            positions.append(torch.arange(longest))
            if rng is not None and rng.random() < 0.25:
                turns = [at for at in range(row.start) if row.ids[at] == TURN_ID] or [1]
                positions[-1][rng.choice(turns) :] += rng.randrange(max(1, MAX_POSITIONS - end))
            answers.append(torch.arange(begin + row.start, begin + end))
            numbers.append(torch.full((end - row.start,), number))
            weights.append(torch.full((end - row.start,), (end - row.start) ** -0.5))
            begin += longest
            number += 1
    return Sequence(
        shapes, torch.cat(ids), torch.cat(positions), torch.cat(answers), torch.cat(numbers), torch.cat(weights)
    )


def answer_logits(model: LlamaForCausalLM, sequence: Sequence) -> Tensor:
    """The logits that predict the answer tokens, `[N, vocabulary]`."""
    device = model.device
    hidden_PD: Tensor = model.model(
        input_ids=sequence.ids_P[None].to(device),
        position_ids=sequence.positions_P[None].to(device),
        # Ones: without a mask, transformers would take the jumps in the positions for the borders of packed texts
        attention_mask=torch.ones(1, len(sequence.ids_P), dtype=torch.long, device=device),
        use_cache=False,
        batch_shapes=sequence.shapes,
    ).last_hidden_state[0]
    logits: Tensor = model.lm_head(hidden_PD[(sequence.answers_N - 1).to(device)])
    return logits


def loss_of(model: LlamaForCausalLM, sequence: Sequence) -> Tensor:
    """Cross entropy summed over the rows, each answer token weighted by the inverse root of its answer's length."""
    labels_N = sequence.ids_P[sequence.answers_N].to(model.device)
    losses_N = functional.cross_entropy(answer_logits(model, sequence).float(), labels_N, reduction="none")
    return (losses_N * sequence.weights_N.to(model.device)).sum()


@torch.inference_mode()
def exact_matches(model: LlamaForCausalLM, rows: list[Row]) -> float:
    """Part of the rows whose whole answer greedy decoding would write, end token included."""
    sequence = packed(rows, None)
    wrong_N = answer_logits(model, sequence).argmax(-1).cpu() != sequence.ids_P[sequence.answers_N]
    return 1 - len(set(sequence.rows_N[wrong_N].tolist())) / len(rows)


def batchwise_attention(
    module: nn.Module,
    query_1HPD: Tensor,
    key_1GPD: Tensor,
    value_1GPD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    batch_shapes: list[tuple[int, int]],
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each row of the sequence's batches: `[1, P, H, D]`, as transformers wants it.

    Written out, for on a CPU the backward pass of the fused one takes longer than all the rest.
    """
    heads, groups, width = query_1HPD.shape[1], key_1GPD.shape[1], query_1HPD.shape[-1]
    sizes = [b * t for b, t in batch_shapes]
    parts = (torch.split(tensor[0], sizes, dim=1) for tensor in (query_1HPD, key_1GPD, value_1GPD))
    outputs = []
    for (b, t), query, key, value in zip(batch_shapes, *parts, strict=True):
        query_BGRTD = query.view(groups, heads // groups, b, t, width).permute(2, 0, 1, 3, 4)
        key_BGDT = key.view(groups, b, t, width).permute(1, 0, 3, 2)
        value_BGTD = value.view(groups, b, t, width).permute(1, 0, 2, 3)
        scores = query_BGRTD.reshape(b, groups, -1, width) @ key_BGDT
        future_TT = torch.ones(t, t, dtype=torch.bool, device=scores.device).triu(1).repeat(heads // groups, 1)
        shares = (scores * scaling).masked_fill(future_TT, -torch.inf).softmax(-1, dtype=torch.float32)
        output_BGRTD = (shares.to(value.dtype) @ value_BGTD).view(b, groups, heads // groups, t, width)
        outputs.append(output_BGRTD.permute(0, 3, 1, 2, 4).reshape(b * t, heads, width))
    return torch.cat(outputs)[None], None


ATTENTION = "batchwise"
AttentionInterface.register(ATTENTION, batchwise_attention)


class Trainer:
    """Owns the model, its float32 master weights and their optimizers."""

    def __init__(self, model: LlamaForCausalLM, learning_rate: float) -> None:
        self.model = model
        self._learning_rate = learning_rate
        self._parameters = list(model.parameters())
        self._masters = [p.detach().float().requires_grad_() for p in self._parameters]
        embedding = model.get_input_embeddings().weight
        matrices = [
            m for m, p in zip(self._masters, self._parameters, strict=True) if m.ndim == 2 and p is not embedding
        ]
        others = [m for m, p in zip(self._masters, self._parameters, strict=True) if m.ndim != 2 or p is embedding]
        self._averages = [master.detach().clone() for master in self._masters]
        # Muon on the matrices reaches the same loss in about half the steps of AdamW here
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, rows: list[Row], rng: random.Random, rate: float) -> float:
        """One update at `rate` times the learning rate; the mean loss of the rows."""
        loss = loss_of(self.model, packed(rows, rng)) / len(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * rate
            optimizer.step()
        self._use_masters()
        for average, master in zip(self._averages, self._masters, strict=True):
            average.lerp_(master.detach(), 1 - AVERAGE_DECAY)
        return loss.item()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model has the running average of its weights: far better while the learning rate is high."""
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            parameter.data.copy_(average)
        yield
        self._use_masters()

    def state(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "masters": self._masters,
            "averages": self._averages,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, own in (("masters", self._masters), ("averages", self._averages)):
            for tensor, saved in zip(own, state[name], strict=True):
                tensor.data.copy_(saved)
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._use_masters()

    def _use_masters(self) -> None:
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            parameter.data.copy_(master.data)


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    *,
    seed: int,
    budget: Budget,
    learning_rate: float,
    report_every_s: float,
    state_file: Path,
) -> Iterator[tuple[int, float]]:
    """Trains to the end of the budget; yields the step and the seconds of training from time to time, and at the end.

    Between, while the caller holds the yielded pair, the model has its averaged weights. What is yielded is in
    ``state_file`` as well: training that was interrupted goes on from there, and comes to the same end.
    """
    trainer = Trainer(model, learning_rate)
    step, average, before_s = 0, 0.0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, map_location=model.device, weights_only=True)
        if state["run"] != [seed, learning_rate]:
            raise SystemExit(f"{state_file} is of a run with another seed or learning rate: remove it")
        trainer.restore(state["trainer"])
        step, average, before_s = state["step"], state["average"], state["seconds"]
        print(f"going on after step {step} of {state_file}", flush=True)
    reported = time.monotonic()
    started = reported - before_s
    done = budget.progress(step, started)
    if done >= 1:  # it was interrupted behind its last step
        with trainer.averaged():
            yield step, before_s
    while done < 1:
        rng = random.Random(f"step {step} of seed {seed}")  # of its own: no state to keep
        rows = encode(tokenizer, list(islice(stream(rng.random()), EXAMPLES_PER_STEP)), rng)
        loss = trainer.step(rows, rng, learning_rate_factor(done))
        average = loss if step == 0 else 0.98 * average + 0.02 * loss
        step += 1
        done = budget.progress(step, started)
        if time.monotonic() - reported > report_every_s or done >= 1:
            reported = time.monotonic()
            seconds = reported - started
            print(f"step {step}, {done:.0%}, {seconds:.0f} s, loss {average:.4f}", flush=True)
            state = {"run": [seed, learning_rate], "step": step, "average": average, "seconds": seconds}
            _save(state | {"trainer": trainer.state()}, state_file)
            with trainer.averaged():
                yield step, seconds


def _save(state: dict[str, Any], file: Path) -> None:
    """The file is whole at any time."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def learning_rate_factor(done: float) -> float:
    """Warm-up, plateau and linear decay over the part of the run that is done."""
    return min(1.0, (done + 1e-3) / WARM_UP, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def quick_scores(model: LlamaForCausalLM, tokenizer: Tokenizer, names: list[str], count: int) -> dict[str, float]:
    """Exact matches on the evaluation sets, from one forward pass each: a lower bound of the real score."""
    rng = random.Random(0)
    return {name: exact_matches(model, encode(tokenizer, held_out(name, count), rng)) for name in names}
