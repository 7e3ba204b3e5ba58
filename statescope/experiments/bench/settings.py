"""What a run of the benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from statescope.experiments.bench.subjects import SHAPES, SIGNATURES
from statescope.models import bundled

USUAL = ("accuracy", "scan", "forward", "stream", "families")
"""Parts that run unless others are named."""

PARTS = (*USUAL, "batch")
"""Parts by name, in the order they run."""


@dataclass(frozen=True)
class Settings:
    """Everything that is chosen; :meth:`of` fills in what suits the device.

    Attributes
    ----------
    parts : tuple of str
        Which of :data:`PARTS`.
    shapes, lengths : tuple
        Public models and signatures whose scan is timed, and tokens.
    rounds : int
        Timed rounds of every contestant.
    model, forward, stream : str, int, tuple of int
        A public shape or a bundled checkpoint; tokens of its forward; tokens of its streams to disk.
    families : int
        Tokens of the forward of a small model of each family.
    windows : tuple of int
        Tokens per entry of ``/steps`` in the streams.
    accuracy, tails, tail : tuple of int, tuple of int, int
        Tokens at which errors are taken; lengths of which only the last ``tail`` tokens are looked at.
    texts : int
        Texts of the batch.
    scratch : Path or None
        Where records are written and removed again; None for the system's temporary folder.
    gpu : bool
        Whether there is one.
    """

    parts: tuple[str, ...]
    shapes: tuple[str, ...]
    lengths: tuple[int, ...]
    rounds: int
    model: str
    forward: int
    stream: tuple[int, ...]
    families: int
    windows: tuple[int, ...]
    accuracy: tuple[int, ...]
    tails: tuple[int, ...]
    tail: int
    texts: int
    scratch: Path | None
    gpu: bool

    @classmethod
    def of(
        cls,
        gpu: bool,
        parts: tuple[str, ...] = USUAL,
        shapes: tuple[str, ...] = ("370M",),
        lengths: tuple[int, ...] = (),
        rounds: int | None = None,
        model: str = "",
        forward: int = 0,
        stream: tuple[int, ...] = (),
        families: int | None = None,
        texts: int | None = None,
        scratch: Path | None = None,
    ) -> Settings:
        """Choose what was left open: what a GPU does in minutes, or a CPU.

        Raises
        ------
        ValueError
            For what is unknown; names the argument.
        """
        for argument, given, known in (
            ("parts", parts, PARTS),
            ("shapes", shapes, (*SHAPES, *SIGNATURES)),
            ("model", (model,) if model else (), (*SHAPES, *bundled())),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"{argument} names {name!r}; choose from {', '.join(known)}")
        numbers = {"lengths": lengths, "rounds": (rounds,), "forward": (forward,), "stream": stream}
        numbers |= {"families": (families,), "texts": (texts,)}
        for argument, values in numbers.items():
            if any(n is not None and (n < 0 or (n == 0 and argument != "forward")) for n in values):
                raise ValueError(f"{argument} holds {values}; expected numbers of 1 or more")
        return cls(
            parts=parts,
            shapes=shapes,
            lengths=lengths or ((2048, 16384, 65536, 262144, 1048576) if gpu else (2048,)),
            rounds=rounds or (5 if gpu else 3),
            model=model or ("370M" if gpu else "mamba2-byte-n64-t512"),
            forward=forward or (65536 if gpu else 8192),
            stream=stream or ((262144, 1048576) if gpu else (16384, 65536)),
            families=families or (16384 if gpu else 1024),
            windows=(64, 1) if gpu else (64,),
            accuracy=(1, 63, 64, 65, 1000, *((10_000, 100_000) if gpu else ())),
            tails=(131_072, 1_048_576) if gpu else (16_384,),
            tail=4096 if gpu else 256,
            texts=texts or (512 if gpu else 64),
            scratch=scratch,
            gpu=gpu,
        )

    @property
    def device(self) -> str:
        """Where everything runs."""
        return "cuda" if self.gpu else "cpu"

    @property
    def dtype(self) -> str:
        """Floating dtype of inputs and models."""
        return "bfloat16" if self.gpu else "float32"

    @property
    def command(self) -> str:
        """The command that measures this, without the places it writes to."""
        given = {
            "parts": ",".join(self.parts),
            "shapes": ",".join(self.shapes),
            "lengths": ",".join(map(str, self.lengths)),
            "rounds": self.rounds,
            "model": self.model,
            "forward": self.forward,
            "stream": ",".join(map(str, self.stream)),
            **({"families": self.families} if "families" in self.parts else {}),
            **({"texts": self.texts} if "batch" in self.parts else {}),
        }
        return "statescope bench " + " ".join(f"--{name} {value}" for name, value in given.items())
