"""Play with the space of a trained model: ``python -m vae_lm.generate prior MODEL``, and others.

Commands: prior, reconstruct, decode, interpolate, analogy, traverse, nearest. Beside them the functions they
are made of: filters of sampling, traversals, neighbours, tables.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fq.run import write_atomically
from vae_lm import latent, sources
from vae_lm.model import Optimus
from vae_lm.sources import Released


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What ``decode(..., do_sample=True, top_k=..., top_p=...)`` leaves of the logits of a step.

    Top-k first, then top-p: the smallest set of tokens whose probability exceeds ``top_p``, the one that
    crosses it included. 0 switches either filter off, as does a ``top_p`` of 1.

    Args:
        logits: ``[B, V]``.
        top_k: number of tokens to keep.
        top_p: probability to keep, in [0, 1].

    Returns:
        ``[B, V]``, minus infinity where a token is out.

    Raises:
        ValueError: a negative ``top_k``, or ``top_p`` outside [0, 1].

    Example:
        >>> filter_logits(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2)
        tensor([[-inf, 2., 1.]])
    """
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(
            f"top_k is {top_k} and top_p {top_p}: a count of tokens and a probability were expected"
        )
    # transformers' own, so that this is what its generation does; they do not read the tokens so far.
    tokens = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    if top_k:
        logits = TopKLogitsWarper(top_k=top_k)(tokens, logits)
    if 0 < top_p < 1:
        logits = TopPLogitsWarper(top_p=top_p)(tokens, logits)
    return logits


def traverse(
    model: Optimus, text: str, dimension: int, values: Sequence[float], **generation: Any
) -> list[str]:
    """Texts of a sentence's latent with one dimension set to each of some values.

    Args:
        model: with tokenisers.
        text: where to start.
        dimension: which, from 0.
        values: in standard deviations of the prior; -3 to 3 is most of it.
        **generation: as for ``model.decode``.

    Returns:
        One text for each value.

    Raises:
        ValueError: there is no such dimension.
    """
    z = model.encode([text]).mu[0]
    return model.decode(latent.traverse(z, dimension, torch.tensor(values)), **generation)


class Neighbours(NamedTuple):
    """Nearest latents of each query, int64 ``[Q, k]``, and Euclidean distances ``[Q, k]``, nearest first."""

    indices: Tensor
    distances: Tensor


def nearest(queries: Tensor, bank: Tensor, *, count: int = 5, chunk_size: int = 256) -> Neighbours:
    """Nearest latents of a bank.

    Args:
        queries: ``[Q, d]``.
        bank: ``[N, d]``, as the means of a corpus.
        count: k.
        chunk_size: queries compared with the bank at once.

    Returns:
        `Neighbours`; ties go to the lower index.

    Raises:
        ValueError: fewer latents than are wanted, or other sizes.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries are {list(queries.shape)} and the bank {list(bank.shape)}: both must be [., d]"
        )
    if not 1 <= count <= len(bank):
        raise ValueError(f"{count} neighbours were asked for but the bank has {len(bank)} latents")
    found = []
    for part in queries.split(chunk_size):
        # Not by products: those lose the small distances that are asked for here.
        distances = torch.cdist(part, bank, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.sort(dim=1, stable=True))
    distances = torch.cat([part.values[:, :count] for part in found])
    return Neighbours(torch.cat([part.indices[:, :count] for part in found]), distances)


def interpolation_table(
    model: Optimus,
    first: str,
    second: str,
    *,
    steps: int = 10,
    modes: Sequence[str] = ("linear", "slerp"),
    **generation: Any,
) -> str:
    """Markdown table of the way between two sentences, a column a mode.

    Args:
        model: with tokenisers.
        first: where it starts.
        second: where it ends.
        steps: see ``model.interpolate``.
        modes: columns.
        **generation: as for ``model.decode``.

    Returns:
        The table; its first column is the share of the way.
    """
    columns = [model.interpolate(first, second, steps=steps, mode=mode, **generation) for mode in modes]
    shares = [f"{step / steps:.2f}" for step in range(steps + 1)]
    return markdown_table(["t", *modes], zip(shares, *columns, strict=True))


def analogy_table(
    model: Optimus,
    items: Sequence[tuple[str, str, str]],
    *,
    scale: float = 1.0,
    **generation: Any,
) -> str:
    """Markdown table of analogies: to C what B is to A.

    Args:
        model: with tokenisers.
        items: triples (A, B, C).
        scale: how far from C.
        **generation: as for ``model.decode``.

    Returns:
        The table; its last column is what the model says.
    """
    if not items:
        return markdown_table(["A", "B", "C", "D"], [])
    a, b, c = (list(column) for column in zip(*items, strict=True))
    found = model.analogy(a, b, c, scale=scale, **generation)
    return markdown_table(["A", "B", "C", "D"], zip(a, b, c, found, strict=True))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in a cell are escaped.

    Example:
        >>> print(markdown_table(["t", "text"], [("0", "a | b")]), end="")
        | t | text |
        |---|---|
        | 0 | a \\| b |
    """
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


# ---- command line

_OWN_OPTIONS = (
    "do_sample", "temperature", "top_k", "top_p", "num_beams", "max_new_tokens", "batch_size", "seed",
    "num_return_sequences", "latents", "attention_mask", "input_ids",
)  # fmt: skip


class Table(NamedTuple):
    """Names of columns, and rows of texts."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How latents become texts; greedily unless told otherwise.

    Raises:
        ValueError: an option is outside its range, has no meaning, or none without ``sample``.
    """

    sample: bool = False
    """Draw the tokens: temperature, then top-k, then top-p."""
    temperature: float = 1.0
    """Of the draws."""
    top_k: int = 0
    """Draw from that many tokens; 0 from all."""
    top_p: float | None = None
    """Draw from the smallest set of tokens that is so probable; left out 1.0, and 0.9 for prior."""
    num_beams: int = 1
    """Beams to search with."""
    max_new_tokens: int | None = None
    """Longest text, EOS included; left out 128, or what fits."""
    batch_size: int = 64
    """Latents decoded together."""
    seed: int = 0
    """Of all draws."""
    generation: tuple[str, ...] = ()
    """More of transformers' generation, as repetition_penalty=1.2 no_repeat_ngram_size=3."""

    def __post_init__(self) -> None:
        if not self.sample and (self.temperature != 1.0 or self.top_k or self.top_p is not None):
            raise ValueError("temperature, top_k and top_p are of drawn tokens: give --sample with them")
        if self.temperature <= 0 or self.num_beams < 1:
            raise ValueError(
                f"temperature is {self.temperature} and num_beams {self.num_beams}: both must be positive"
            )
        filter_logits(torch.zeros(1, 2), top_k=self.top_k, top_p=1.0 if self.top_p is None else self.top_p)
        for item in self.generation:
            name, equals, _ = item.partition("=")
            if not (name and equals):
                raise ValueError(f"generation has {item!r} but NAME=VALUE was expected")
            if name in _OWN_OPTIONS:
                raise ValueError(
                    f"generation has {item!r}, which is an option of its own or set by the command"
                )

    def options(self, *, usual_top_p: float = 1.0) -> dict[str, Any]:
        """Arguments of ``Optimus.decode``."""
        found: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        found["max_new_tokens"] = self.max_new_tokens
        if self.num_beams > 1:
            found["num_beams"] = self.num_beams
        if self.sample:
            top_p = usual_top_p if self.top_p is None else self.top_p
            found |= {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": top_p}
        return found | {
            name: _value(text) for name, _, text in (item.partition("=") for item in self.generation)
        }


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How the result is shown."""

    form: Literal["table", "lines"] = "table"
    """A Markdown table, or lines with tabulators between columns, for another program."""
    out: str = ""
    """File for it; the standard output when empty."""
    png: str = ""
    """The table as a picture, too."""


@dataclass(frozen=True, kw_only=True)
class _Command:
    """What all commands are given."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a model, of a run, or of a released checkpoint."""
    shown: Shown = field(default_factory=Shown)
    released: Released = field(default_factory=Released)


@dataclass(frozen=True, kw_only=True)
class _OfTexts(_Command):
    """A command that is given texts."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts; those of --input when there are none."""
    input: str = sources.STDIN
    """File with one item a line, its texts with tabulators between them; - is the standard input."""

    def __post_init__(self) -> None:
        if self.texts and self.input != sources.STDIN:
            raise ValueError(f"there are texts and --input {self.input}: give one of them")

    def items(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Texts in groups of as many as there are names."""
        if not self.texts:
            return sources.fields(self.input, names)
        if len(self.texts) != len(names) or not all(text.strip() for text in self.texts):
            raise ValueError(f"texts are {list(self.texts)} but {', '.join(names)} were expected")
        return [self.texts]

    def all_texts(self) -> list[str]:
        """Texts that stand alone, whatever tabulators are in them."""
        if not all(text.strip() for text in self.texts):
            raise ValueError(f"texts are {list(self.texts)} but a blank one says nothing: leave it out")
        return list(self.texts) or sources.texts(self.input)


@dataclass(frozen=True, kw_only=True)
class Prior(_Command):
    """Texts of latents drawn from N(0, I)."""

    count: int = 10
    """How many."""
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count} but at least one text must be asked for")

    def table(self, model: Optimus) -> Table:
        """One column."""
        found = model.sample(self.count, **self.decoding.options(usual_top_p=0.9))
        return Table(("text",), [(text,) for text in found])


@dataclass(frozen=True, kw_only=True)
class Reconstruct(_OfTexts):
    """Texts through their latents' means and back."""

    decoding: Decoding = field(default_factory=Decoding)

    def table(self, model: Optimus) -> Table:
        """Texts, and what comes back."""
        given = self.all_texts()
        back = model.reconstruct(given, **self.decoding.options())
        return Table(("text", "reconstruction"), list(zip(given, back, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Decode(_Command):
    """Texts of latents in a file, as a diffusion model or vae_lm.embed writes."""

    latents: Annotated[str, tyro.conf.Positional]
    """.npy or .safetensors, float [N, latent_dim]."""
    whitened: bool = False
    """Undo the whitening by the statistics in the model's folder first."""
    decoding: Decoding = field(default_factory=Decoding)

    def table(self, model: Optimus) -> Table:
        """One column."""
        z = sources.latents(self.latents, model.config.latent_dim)
        if self.whitened:
            z = sources.statistics(model).unwhiten(z)
        return Table(("text",), [(text,) for text in model.decode(z, **self.decoding.options())])


@dataclass(frozen=True, kw_only=True)
class Interpolate(_OfTexts):
    """The way from one text to another; lines are A<TAB>B."""

    steps: int = 10
    """Equal steps, one text more than that."""
    modes: tuple[Literal["linear", "slerp"], ...] = ("linear", "slerp")
    """Straight, or along a great circle; a column each."""
    decoding: Decoding = field(default_factory=Decoding)

    def table(self, model: Optimus) -> Table:
        """The share of the way, and a column a mode; numbers of the pairs, if there are several."""
        pairs = self.items(("A", "B"))
        ends = [text for column in zip(*pairs, strict=True) for text in column]
        firsts, seconds = model.encode(ends).mu.chunk(2)
        ways = [
            latent.interpolate(first, second, steps=self.steps, mode=mode)
            for first, second in zip(firsts, seconds, strict=True)
            for mode in self.modes
        ]
        found = model.decode(torch.cat(ways), **self.decoding.options())
        rows = []
        for pair in range(len(pairs)):
            for step in range(self.steps + 1):
                starts = [(pair * len(self.modes) + m) * (self.steps + 1) for m in range(len(self.modes))]
                number = (str(pair + 1),) if len(pairs) > 1 else ()
                rows.append((*number, f"{step / self.steps:.2f}", *(found[start + step] for start in starts)))
        return Table((*(("pair",) if len(pairs) > 1 else ()), "t", *self.modes), rows)


@dataclass(frozen=True, kw_only=True)
class Analogy(_OfTexts):
    """To C what B is to A; lines are A<TAB>B<TAB>C."""

    scale: float = 1.0
    """How far from C."""
    decoding: Decoding = field(default_factory=Decoding)

    def table(self, model: Optimus) -> Table:
        """A, B, C and what the model says."""
        items = self.items(("A", "B", "C"))
        a, b, c = (list(column) for column in zip(*items, strict=True))
        found = model.analogy(a, b, c, scale=self.scale, **self.decoding.options())
        return Table(("A", "B", "C", "D"), list(zip(a, b, c, found, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Traverse(_OfTexts):
    """Texts with one dimension of their latents set to values."""

    dimension: int
    """Which, from 0."""
    values: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    """In standard deviations of the prior."""
    decoding: Decoding = field(default_factory=Decoding)

    def table(self, model: Optimus) -> Table:
        """The value, and a column a text."""
        given, options = self.all_texts(), self.decoding.options()
        columns = [traverse(model, text, self.dimension, self.values, **options) for text in given]
        numbers = [f"{value:g}" for value in self.values]
        return Table((f"z[{self.dimension}]", *given), list(zip(numbers, *columns, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Nearest(_OfTexts):
    """Texts of a file whose latents are nearest to those of the texts."""

    bank: str
    """File with one text a line, to choose from."""
    count: int = 5
    """Neighbours of each text."""

    def table(self, model: Optimus) -> Table:
        """Text, distance, neighbour."""
        given, choices = self.all_texts(), sources.texts(self.bank)
        found = nearest(model.encode(given).mu, model.encode(choices).mu, count=self.count)
        rows: list[tuple[str, ...]] = [
            (text, f"{distance:.3f}", choices[index])
            for text, indices, distances in zip(given, *map(Tensor.tolist, found), strict=True)
            for index, distance in zip(indices, distances, strict=True)
        ]
        return Table(("text", "distance", "neighbour"), rows)


Command = (
    Annotated[Prior, tyro.conf.subcommand("prior")]
    | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Interpolate, tyro.conf.subcommand("interpolate")]
    | Annotated[Analogy, tyro.conf.subcommand("analogy")]
    | Annotated[Traverse, tyro.conf.subcommand("traverse")]
    | Annotated[Nearest, tyro.conf.subcommand("nearest")]
)


def show(table: Table, shown: Shown) -> None:
    """Print or write a table.

    Raises:
        ImportError: a picture is asked for and matplotlib is missing.
    """
    if shown.png:
        from vae_lm.picture import save_table  # matplotlib is needed for pictures alone

        save_table(table.header, table.rows, Path(shown.png))
    if shown.form == "table":
        text = markdown_table(table.header, table.rows)
    else:
        text = "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in table.rows)
    if shown.out:
        write_atomically(shown.out, text)
    else:
        print(text, end="")
    for path in filter(None, (shown.out, shown.png)):
        print(f"written to {path}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, generate, and show what came out.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        command: Any = tyro.cli(
            Command,  # type: ignore[arg-type]
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vae_lm.generate",
            description="Play with the latent space of a sentence VAE.",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        show(command.table(sources.open_model(command.model, command.released)), command.shown)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
