"""Draws bench records and routing: ``python -m anyep.plot RECORDS.jsonl --out DIR [--trace FILE]``.

``latency`` and ``bandwidth`` take records as ``read_records`` returns them (one JSON object per figure, docs/python/plot.md
names the fields); ``load`` takes expert ids. Each writes a PNG and an SVG and returns their paths. Needs matplotlib,
which is imported when something is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import warnings
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from ._charts import Load, Series, draw_curves, draw_load
from .errors import ArgumentError

__all__ = ["bandwidth", "latency", "load", "read_records", "select"]

Path = Union[str, pathlib.Path]
Record = Dict[str, Any]

OPERATIONS = {
    "dispatch": "dispatch",
    "dispatch_cached": "dispatch, cached",
    "combine": "combine",
    "pair": "pair: dispatch + combine",
    "dispatch_send": "dispatch, send half",
    "dispatch_recv": "dispatch, receive half",
    "combine_send": "combine, send half",
    "combine_recv": "combine, receive half",
}
KINDS = {"ht": "high throughput", "ll": "low latency"}
# What makes a figure; of several records of one figure the last counts, as in bench/compare.py.
FIGURE = ("op", "kind", "dtype", "memory", "api", "tokens", "hidden", "topk", "experts", "ranks", "sms", "routing", "graph",
          "gpu", "count")
# What tells the curves of a panel apart, if it varies; else it stands under the title.
CURVE = ("dtype", "memory", "api", "sms", "graph", "hidden", "topk", "experts", "routing", "gpu", "count")
PEER_CURVE = ("dtype", "hidden", "topk", "experts", "routing", "gpu", "count")
_YARDSTICKS = ("ceiling", "pattern", "agreement")  # of bench gpu


def read_records(path: Path) -> List[Record]:
    """Reads a file of records, one JSON object per line; empty lines, and the ceilings and patterns that
    stand beside the operations, are skipped.

    Raises:
        OSError: the file cannot be read. ArgumentError: a line is no JSON object, or lacks ``op``, ``tokens`` or ``ranks``.
    """
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ArgumentError(f"read_records: {path}:{number} is not JSON: {error}. Give a file of records.",
                                    argument="path") from None
            if isinstance(record, dict) and record.get("op") in _YARDSTICKS:
                continue
            fault = _fault(record)
            if fault:
                raise ArgumentError(f"read_records: {path}:{number}: {fault}. Give a file of records.", argument="path")
            records.append(record)
    return records


def _fault(record: Any) -> str:
    if not isinstance(record, dict):
        return f"{type(record).__name__}, allowed: a JSON object"
    if not isinstance(record.get("op"), str):
        return f"op = {record.get('op')!r}, allowed: a text"
    for field in ("tokens", "ranks"):
        if not isinstance(record.get(field), int) or record[field] < 0:
            return f"{field} = {record.get(field)!r}, allowed: an integer from 0"
    peers = record.get("peer") or []
    if not isinstance(peers, list) or not all(isinstance(peer, dict) and isinstance(peer.get("name"), str) for peer in peers):
        return "peer, allowed: a list of objects with a name"
    for holder in (record, *peers):
        for field in ("us_p50", "us_p99", "wire_gbs", "ceiling_gbs", "pattern_gbs", "steps_us"):
            if holder.get(field) is not None and not _is_quantity(holder[field]):
                return f"{field} = {holder[field]!r}, allowed: a finite number from 0, or null"
    return ""


def _is_quantity(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def select(records: Iterable[Record], **fields: Any) -> List[Record]:
    """The records whose fields have the given values; a list, tuple or set allows any of several."""
    wanted = {name: value if isinstance(value, (list, tuple, set)) else [value] for name, value in fields.items()}
    return [record for record in records if all(record.get(name) in values for name, values in wanted.items())]


def latency(records: Sequence[Record], out: Path) -> List[pathlib.Path]:
    """Time per call over tokens per rank: a panel for every operation and number of ranks; the median as a line with a
    band up to p99, peers of the same run dashed, and what the bytes on the wire take at the ceiling's rate dotted.

    Args:
        records: figures with ``us_p50`` in us; wrong results (``wrong`` > 0) are left out with a warning.
        out: a path that ends in .png or .svg, or one without an ending: both.

    Returns:
        The paths written.

    Raises:
        ArgumentError: no record can be drawn, or ``out`` has another ending. ImportError: matplotlib is missing.
    """
    figures = _figures("latency", records, lambda record: record.get("us_p50"))
    panels = _panels(figures, lambda figure: (figure["us_p50"], figure.get("us_p99")), _time_floor)
    floor = ""
    if any(figure.get("steps_us") for figure in figures):
        floor = "two steps of the link"
    elif any(_time_floor(figure, "") for figure in figures):
        floor = "the bytes on the wire at the ceiling's rate"
    lines = [f"Time per call: AnyEP{_against(figures)}", _subtitle(figures),
             "Line: median; band: up to p99" + (f"; floor: {floor}." if floor else ".") + _memory_words(figures)]
    return draw_curves(panels, lines, "time", out)


def bandwidth(records: Sequence[Record], out: Path) -> List[pathlib.Path]:
    """Rate on the wire over tokens per rank, panels as in ``latency``: wire rows x row bytes / time in GB/s (1e9 bytes); the
    median as a line with a band down to the rate at p99, peers of the same run dashed, the ceiling dotted.

    Arguments, result and errors as in ``latency``; records need ``wire_gbs``.
    """
    figures = _figures("bandwidth", records, lambda record: record.get("us_p50") and record.get("wire_gbs"))

    def rate(figure: Record) -> Tuple[float, Optional[float]]:
        p99 = figure.get("us_p99")
        return figure["wire_gbs"], figure["wire_gbs"] * figure["us_p50"] / p99 if p99 and figure.get("us_p50") else None

    panels = _panels(figures, rate, _rate_ceiling)
    lines = [f"Rate on the wire: AnyEP{_against(figures)}", _subtitle(figures),
             "Line: median; band: down to p99." + _memory_words(figures)]
    return draw_curves(panels, lines, "rate", out)


def load(experts: Any, num_experts: int, num_ranks: int, out: Path) -> List[pathlib.Path]:
    """Load per expert and per rank of one batch: choices (compute) of every expert and rank, and rows (network), where a
    token counts once for each rank it goes to.

    Args:
        experts: integers [tokens, top_k], anything that numpy takes: the choices of all ranks' tokens, -1 = unused.
        num_experts: experts of all ranks, 1 or more, in contiguous blocks; the first ``num_experts % num_ranks`` ranks have
            one more than the others.
        num_ranks: 1 or more.
        out: a path that ends in .png or .svg, or one without an ending: both.

    Returns:
        The paths written.

    Raises:
        ArgumentError: shape, element type or an id out of range. ImportError: numpy or matplotlib is missing.
    """
    import numpy

    if num_experts < 1 or num_ranks < 1:
        raise ArgumentError(f"load: num_experts = {num_experts}, num_ranks = {num_ranks}, allowed: from 1. Pass both sizes of "
                            "the group.", argument="num_experts" if num_experts < 1 else "num_ranks")
    ids = numpy.asarray(experts)
    if ids.ndim != 2 or not numpy.issubdtype(ids.dtype, numpy.integer):
        raise ArgumentError(f"load: experts = {ids.shape} {ids.dtype}, allowed: integers [tokens, top_k]. Pass topk_idx.",
                            argument="experts")
    outside = (ids < -1) | (ids >= num_experts)
    if outside.any():
        token, slot = numpy.argwhere(outside)[0]
        raise ArgumentError(f"load: experts[{token}, {slot}] = {ids[token, slot]}, allowed: -1..{num_experts - 1}. Pass the "
                            "number of experts that the ids go up to.", argument="experts")
    base, more = divmod(num_experts, num_ranks)
    starts = [rank * base + min(rank, more) for rank in range(num_ranks + 1)]
    per_expert = numpy.bincount(ids[ids >= 0].astype(numpy.int64), minlength=num_experts)
    chosen = [((ids >= starts[rank]) & (ids < starts[rank + 1])) for rank in range(num_ranks)]
    pairs = [int(mask.sum()) for mask in chosen]
    rows = [int(mask.any(axis=1).sum()) for mask in chosen]
    title = f"Load of a batch: {ids.shape[0]:,} tokens, top-{ids.shape[1]} of {num_experts} experts on {num_ranks} ranks"
    return draw_load(Load(per_expert.tolist(), starts, pairs, rows), title, out)


# ---- From records to curves


def _figures(function: str, records: Sequence[Record], value: Callable[[Record], Any]) -> List[Record]:
    """The last record of every figure that has the value and right results."""
    figures: Dict[Tuple[Any, ...], Record] = {}
    for record in records:
        fault = _fault(record)
        if fault:
            raise ArgumentError(f"{function}: a record has {fault}. Pass what read_records returns.", argument="records")
        if record["op"] not in OPERATIONS or not value(record):
            continue
        if record.get("wrong"):
            warnings.warn(f"{function}: left out {record['op']} with {record['tokens']} tokens: {record['wrong']} wrong "
                          "elements", stacklevel=3)
            continue
        key = tuple(record.get(field) for field in FIGURE)
        figures.pop(key, None)
        figures[key] = record
    if not figures:
        raise ArgumentError(f"{function}: records = {len(records)} without a figure to draw, allowed: operations with "
                            f"{'us_p50' if function == 'latency' else 'us_p50 and wire_gbs'}. Pass other records.",
                            argument="records")
    return list(figures.values())


Panel = Tuple[str, List[Series]]


def _panels(figures: List[Record], value: Callable, limit: Callable) -> List[List[Optional[Panel]]]:
    """A grid: a row for every kind and number of ranks, its columns the operations of that kind in the order of OPERATIONS;
    None where nothing was measured."""
    heads = sorted({(figure.get("kind") or "", figure["ranks"]) for figure in figures})
    several = len({kind for kind, _ in heads}) > 1
    names = _Names(figures)
    grid: List[List[Optional[Panel]]] = []
    for kind, ranks in heads:
        operations = [op for op in OPERATIONS if any((f.get("kind") or "", f["op"]) == (kind, op) for f in figures)]
        row: List[Optional[Panel]] = []
        for op in operations:
            mine = [f for f in figures if (f.get("kind") or "", f["ranks"], f["op"]) == (kind, ranks, op)]
            title = f"{OPERATIONS[op]}, {ranks} {'rank' if ranks == 1 else 'ranks'}"
            title += f", {KINDS.get(kind, kind)}" if several and kind else ""
            row.append((title, _curves(mine, names, value, limit)) if mine else None)
        grid.append(row)
    width = max(len(row) for row in grid)
    return [row + [None] * (width - len(row)) for row in grid]


class _Names:
    """Names curves by the fields that vary among all figures."""

    def __init__(self, figures: List[Record]) -> None:
        self._varying = {field for field in CURVE if len({figure.get(field) for figure in figures}) > 1}
        peers = {(peer["name"], peer.get("sms")) for figure in figures for peer in figure.get("peer") or []}
        self._peer_sms = len(peers) > len({name for name, _ in peers})

    def of(self, figure: Record, fields: Sequence[str]) -> str:
        return ", ".join(_say(field, figure.get(field)) for field in fields
                         if field in self._varying and figure.get(field) is not None)

    def ours(self, figure: Record) -> str:
        return self.of(figure, CURVE) or "AnyEP"

    def of_peer(self, figure: Record, peer: Record) -> str:
        sms = _say("sms", peer.get("sms")) if self._peer_sms and peer.get("sms") is not None else ""
        return ", ".join(part for part in (peer["name"], sms, self.of(figure, PEER_CURVE)) if part)


def _say(field: str, value: Any) -> str:
    words = {"dtype": str(value).upper(), "memory": f"{value}", "sms": f"{value} SMs", "hidden": f"H {value}",
             "topk": f"top-{value}", "experts": f"{value} experts", "graph": "graph" if value else "eager",
             "count": f"x {value}"}
    return words.get(field, str(value))


def _curves(figures: List[Record], names: _Names, value: Callable, limit: Callable) -> List[Series]:
    ours: Dict[str, Series] = {}
    peers: Dict[str, Series] = {}
    limits: Dict[str, Series] = {}
    for figure in figures:
        tokens = figure["tokens"]
        name = names.ours(figure)
        ours.setdefault(name, Series(name, "ours")).add(tokens, *value(figure))
        for peer in figure.get("peer") or []:
            merged = {"wire_gbs": None, **peer}
            point = value(merged) if merged.get("us_p50") else (None, None)
            if point[0]:
                name = names.of_peer(figure, peer)
                peers.setdefault(name, Series(name, "peer")).add(tokens, *point)
        for name, most in limit(figure, names.of(figure, PEER_CURVE)):
            limits.setdefault(name, Series(name, "limit")).add(tokens, most, None)
    return [*ours.values(), *peers.values(), *limits.values()]


def _time_floor(figure: Record, variant: str) -> List[Tuple[str, float]]:
    """What the figure would take at the ceiling: the decode steps for pairs, else the bytes on the wire at the ceiling."""
    name = f"floor, {variant}" if variant else "floor"
    if figure.get("steps_us"):
        return [(name, figure["steps_us"])]
    if figure.get("wire_gbs") and figure.get("ceiling_gbs"):
        return [(name, figure["us_p50"] * figure["wire_gbs"] / figure["ceiling_gbs"])]
    return []


def _rate_ceiling(figure: Record, _: str) -> List[Tuple[str, float]]:
    """The ceiling of the machine is one line, whatever moves."""
    on_cpu = str(figure.get("gpu", "")).startswith("cpu:")
    limits = [("ceiling: memory copy" if on_cpu else "ceiling: link", figure.get("ceiling_gbs"))]
    limits.append(("pattern without protocol", figure.get("pattern_gbs")))
    return [(name, most) for name, most in limits if most]


def _against(figures: List[Record]) -> str:
    names = sorted({peer["name"] for figure in figures for peer in figure.get("peer") or []})
    return f" against {', '.join(names)}" if names else ""


def _memory_words(figures: List[Record]) -> str:
    both = {figure.get("memory") for figure in figures} >= {"window", "caller"}
    return " Rows lie in AnyEP's memory (window) or in the caller's." if both else ""


def _subtitle(figures: List[Record]) -> str:
    """What all figures share, machine first."""

    def common(field: str) -> Any:
        values = {figure.get(field) for figure in figures}
        return values.pop() if len(values) == 1 else None

    parts = []
    if common("gpu"):
        processor = str(common("gpu"))
        cores = processor.startswith("cpu:")
        parts.append(processor[4:] if cores else processor)
        if common("count"):
            parts[0] += f", {common('count')} cores" if cores else f" x {common('count')}"
    parts += [KINDS.get(common("kind"), str(common("kind")))] if common("kind") else []
    parts += [_say(field, common(field)) for field in ("hidden",) if common(field)]
    if common("topk") and common("experts"):
        parts.append(f"top-{common('topk')} of {common('experts')} experts")
    parts += [_say(field, common(field)) for field in ("dtype",) if common(field)]
    parts += [f"routing {common('routing')}"] if common("routing") else []
    parts += [{"window": "rows in AnyEP's memory", "caller": "rows in the caller's memory"}[m]
              for m in [common("memory")] if m in ("window", "caller")]
    commits = sorted({str(figure["commit"]) for figure in figures if figure.get("commit")})
    if commits:
        dirty = ", uncommitted changes: not to be quoted" if any("+dirty" in commit for commit in commits) else ""
        parts.append(("commit " if len(commits) == 1 else "commits ") + ", ".join(c[:7] for c in commits[:3]) + dirty)
    return " · ".join(parts)


# ---- The command


def _jobs(arguments: argparse.Namespace) -> List[Tuple[str, Callable[[], List[pathlib.Path]]]]:
    """What there is to draw, after all input has been read."""
    out = pathlib.Path(arguments.out)
    records = [record for path in arguments.records for record in read_records(path)]
    for condition in arguments.where:
        field, sign, values = condition.partition("=")
        if not sign or not field:
            raise ArgumentError(f"--where {condition}: allowed: FIELD=VALUE or FIELD=VALUE,VALUE. Name a field of the records.")
        records = [record for record in records if str(record.get(field)) in values.split(",")]
    jobs: List[Tuple[str, Callable[[], List[pathlib.Path]]]] = []
    for kind in sorted({record.get("kind") or "all" for record in records}):
        mine = [record for record in records if (record.get("kind") or "all") == kind]
        timed = [record for record in mine if record["op"] in OPERATIONS and record.get("us_p50")]
        if timed:
            jobs.append((f"latency, {kind}", lambda mine=mine, kind=kind: latency(mine, out / f"latency_{kind}")))
        if any(record.get("wire_gbs") for record in timed):
            jobs.append((f"bandwidth, {kind}", lambda mine=mine, kind=kind: bandwidth(mine, out / f"bandwidth_{kind}")))
    if arguments.trace:
        from .workload import read_trace

        batch = read_trace(arguments.trace)
        ranks = arguments.ranks or batch.num_ranks
        jobs.append(("load", lambda: load(batch.experts, batch.num_experts, ranks, out / "load")))
    return jobs


def _with_progress(jobs: Sequence[Any]) -> Iterable[Any]:
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            return jobs
        return track(jobs, description="drawing", console=Console(stderr=True), transient=True)
    return jobs


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command. Returns 0 if something was drawn, 1 if there was nothing to draw or matplotlib is missing, 2 if an
    argument or a file is wrong."""
    parser = argparse.ArgumentParser(prog="python -m anyep.plot", description="Draws bench records and routing as PNG and SVG.")
    parser.add_argument("records", nargs="*", metavar="RECORDS.jsonl", help="files of bench records")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the pictures, made if missing")
    parser.add_argument("--trace", metavar="FILE", help="a trace whose load per expert and rank is drawn")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks of the load (default: those of the trace)")
    parser.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE[,VALUE]",
                        help="only records with this value; may be repeated")
    arguments = parser.parse_args(argv)
    if not arguments.records and not arguments.trace:
        parser.error("nothing to draw: give files of records, --trace, or both")
    try:
        jobs = _jobs(arguments)
        if not jobs:
            print("anyep.plot: the records hold no figure to draw", file=sys.stderr)
            return 1
        written = [path for _, job in _with_progress(jobs) for path in job()]
    except (ArgumentError, OSError, UnicodeDecodeError) as error:
        print(f"anyep.plot: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"anyep.plot: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
