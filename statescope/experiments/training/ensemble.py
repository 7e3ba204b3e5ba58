"""Runs of one shape trained as one, and what is kept of them.

A step is: draw the data, read, differentiate, clip each run's gradient, AdamW. On a GPU it is recorded once
as a CUDA graph and replayed, so that nothing is launched one by one. What one run learns does not depend on
the others: no number of one enters another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from statescope.experiments.training.config import Config
from statescope.experiments.training.draws import Draws
from statescope.experiments.training.model import Parameters, Scan, Shape, read
from statescope.experiments.training.scans import choose
from statescope.experiments.training.streams import SHORTEST, Batch, Rows, Stream, stream_of
from statescope.models import mamba2_config
from statescope.tokens import BYTES

BETAS = 0.9, 0.95
FLOOR = 0.05
"""What is left of the learning rate at the end."""

WARM = 3
"""Steps that are run, and undone, before a graph is recorded."""


class Ensemble:
    """Runs of one shape: their weights, their optimiser's moments, and how far they are.

    Parameters
    ----------
    configs : list of Config
        The runs; alike but for what :data:`~statescope.experiments.training.config.OWN` names.
    device : torch.device
        Where to train.
    fuse : bool
        Let ``torch.compile`` fuse what runs between the matrix products.
    record : bool
        On a GPU, record a step as a graph and replay it.

    Raises
    ------
    ValueError
        If the runs cannot be trained as one, or not with the kernels they ask for.
    """

    def __init__(
        self, configs: list[Config], device: torch.device, fuse: bool = False, record: bool = True
    ) -> None:
        if len({c.shape() for c in configs}) != 1:
            raise ValueError("configs are of different shapes; train them one after the other")
        first = configs[0]
        self.configs, self.device = configs, device
        self.kernels = choose(first, device)
        self.shape = Shape(first.vocabulary, first.layers, first.width, first.state_size, first.head_size)
        self.stream: Stream = stream_of(configs, device)
        self.dtype = getattr(torch, first.dtype)
        self.seeds = torch.tensor([c.seed for c in configs], device=device)
        self.lengths = torch.tensor([c.train_length for c in configs], device=device)
        self.rates = torch.tensor([c.learning_rate for c in configs], device=device)[:, None]
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        drawn = [self.shape.initial(c.seed) for c in configs]
        self.flat = torch.stack([torch.cat([w.flatten() for w in d.values()]) for d in drawn]).to(device)
        self.moments = torch.zeros(2, *self.flat.shape, device=device)
        self.loss = torch.zeros(len(configs), device=device)
        sizes = self.shape.parameters()
        decays = [torch.full((math.prod(s),), float(len(s) == 2)) for s in sizes.values()]
        self.decays = first.weight_decay * torch.cat(decays).to(device)
        self._draw: Any = self.batch
        self._compute: Any = self.losses
        self._update: Any = self._adamw
        if fuse:
            torch.compiler.reset()  # each ensemble has sizes of its own
            self._draw, self._compute, self._update = (
                torch.compile(f, dynamic=False) for f in (self.batch, self.losses, self._adamw)
            )
        self._records = record and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def parameters(self) -> Parameters:
        """Views of the weights, (run, ...), by the names of transformers."""
        found, at = {}, 0
        for name, size in self.shape.parameters().items():
            found[name] = self.flat[:, at : at + math.prod(size)].unflatten(1, size)
            at += math.prod(size)
        return found

    def batch(self) -> Batch:
        """Draw the data of this step."""
        c = self.configs[0]
        draws = Draws(self.seeds, self.step)
        rows = Rows.cut(draws, c.rows, c.row, self.lengths, c.short, SHORTEST[c.stream])
        return self.stream.draw(draws, rows)

    def losses(self, p: Parameters, batch: Batch) -> Tensor:
        """Mean loss of every run, (run,), in nat."""
        chunk, scan = self.configs[0].chunk, self.kernels.scan
        logits = answer_logits(p, self.shape, self.stream, batch, chunk, self.dtype, scan)
        loss = cross_entropy(logits.flatten(0, 2), batch.answers.flatten(), reduction="none")
        weight = batch.weight.flatten(1)
        return (loss.view_as(weight) * weight).sum(1) / weight.sum(1).clamp(min=1e-6)

    def train(self, until: int, tick: Callable[[int, float], None] | None = None, every: int = 50) -> None:
        """Train up to a step; ``tick`` is told now and then how many were done, and the mean loss."""
        if self._records and self._graph is None:
            self._record()
        done = int(self.step)
        while done < until:
            some = min(every, until - done)
            for _ in range(some):
                if self._graph is None:
                    self._advance()
                else:
                    self._graph.replay()
            done += some
            if tick is not None:
                tick(some, float(self.loss.mean()))

    def _advance(self) -> None:
        leaves = {name: w.detach().requires_grad_() for name, w in self.parameters().items()}
        losses = self._compute(leaves, self._draw())
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        self._update(torch.cat([g.flatten(1) for g in grads], 1))
        self.loss.copy_(losses.detach())
        self.step += 1

    def _adamw(self, grad: Tensor) -> None:
        c = self.configs[0]
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        grad = grad * (c.clip / norm.clamp(min=c.clip))
        for moment, beta, now in zip(self.moments, BETAS, (grad, grad.square()), strict=True):
            moment.lerp_(now, 1 - beta)
        t = self.step + 1.0
        mean, square = (m / (1 - b**t) for m, b in zip(self.moments, BETAS, strict=True))
        after = (t - c.warmup).clamp(min=0) / max(c.steps - c.warmup, 1)
        falling = FLOOR + (1 - FLOOR) * 0.5 * (1 + torch.cos(math.pi * after))
        rate = self.rates * falling * (t / c.warmup).clamp(max=1)
        self.flat.sub_(rate * (mean / (square.sqrt() + 1e-8) + self.decays * self.flat))

    def _record(self) -> None:
        """Record a step as a graph; the steps that warm up are undone."""
        kept = [x.clone() for x in self._state().values()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        self._graph = graph
        for x, value in zip(self._state().values(), kept, strict=True):
            x.copy_(value)

    def _state(self) -> dict[str, Tensor]:
        return {"weights": self.flat, "moments": self.moments, "step": self.step}

    def save(self, path: Path) -> None:
        """Keep all that training goes on from; the file is replaced at once or not at all."""
        state = {name: x.cpu() for name, x in self._state().items()}
        _save(state, path, {"runs": json.dumps([c.to_json() for c in self.configs])})

    def resume(self, path: Path) -> None:
        """Go on from what was kept.

        Raises
        ------
        ValueError
            If it is of other runs.
        """
        with safe_open(path, "pt") as file:
            runs = json.loads((file.metadata() or {}).get("runs", "[]"))
            if [Config.from_json(r) for r in runs] != self.configs:
                raise ValueError(f"{path} holds the state of other runs; name another folder, or remove it")
            for name, x in self._state().items():
                x.copy_(file.get_tensor(name))

    def export(self, run: int, folder: Path) -> None:
        """Write one run as a transformers checkpoint, with its settings in ``run.json`` beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.configs[run]
        self.model_config(run).save_pretrained(folder)
        weights = {name: w[run].float().cpu().contiguous() for name, w in self.parameters().items()}
        (folder / "run.json").write_text(json.dumps(config.to_json(), indent=1), encoding="utf-8")
        _save(weights, folder / "model.safetensors", {"format": "pt"})

    def model_config(self, run: int) -> Any:
        """Configuration of one run's model, transformers' ``Mamba2Config``."""
        c = self.configs[run]
        ssm = {"layer": "Mamba2", "d_state": c.state_size, "headdim": c.head_size, "chunk_size": c.chunk}
        sizes = {"d_model": c.width, "n_layer": c.layers, "vocab_size": c.vocabulary}
        config = mamba2_config({**sizes, "ssm_cfg": ssm, "pad_vocab_size_multiple": 1})
        config.train_length = c.train_length
        config.predicts_next_token = c.stream == "text"  # else only the values of keys, where they are asked
        if c.stream == "text":
            config.statescope_tokenizer = BYTES
        return config


def answer_logits(
    p: Parameters,
    shape: Shape,
    stream: Stream,
    batch: Batch,
    chunk: int,
    dtype: torch.dtype,
    scan: Scan | None = None,
) -> Tensor:
    """Logits of the answers where they are asked, (run, row, asked, choice), float32."""
    hidden = read(p, shape, batch.ids, batch.position, chunk, dtype, scan)[:, :, :: stream.stride]
    head = p["backbone.embeddings.weight"][:, : stream.choices].to(dtype)
    return torch.bmm(hidden.flatten(1, 2), head.mT).unflatten(1, hidden.shape[1:3]).float()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata)
    part.replace(path)
