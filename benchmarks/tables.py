"""Markdown from rows. On a GPU times are given; on a CPU ratios within one run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import providers, store
from benchmarks.targets import TARGETS, values
from mos_kernels.run_report.log import write_text

NOT_MEASURED = "not measured"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]
    return "\n".join(rows)


def write_between(page: Path, begin: str, end: str, text: Callable[[], str]) -> bool:
    """Put the text between two marks of a page; False where the page or a mark is missing."""
    before = page.read_text() if page.is_file() else ""
    if begin not in before or end not in before:
        return False
    head, rest = before.split(begin, 1)
    _, tail = rest.split(end, 1)
    write_text(page, f"{head}{begin}\n{text()}\n{end}{tail}")
    return True


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def is_gpu(rows: list[dict]) -> bool:
    return any("gpu" in row for row in rows)


def duration(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} µs" if seconds < 0.9995e-3 else f"{1e3 * seconds:.3g} ms"


def made_with(rows: list[dict]) -> str:
    """The machine, versions, commits and dates of the rows, in a line."""
    last = max(rows, key=lambda row: row["run"])
    machines = [row.get("gpu") or f"{row['cpu']}, {counted(row['threads'], 'thread')}" for row in store.measured(rows)]
    where = " and ".join(dict.fromkeys(machines))
    packages = ", ".join(f"{name} {last[name]}" for name in ("torch", "triton", "peft", "geoopt") if last.get(name))
    commits = ", ".join(
        f"`{commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}`" for commit in commits_of(rows)
    )
    days = sorted({row["run"][:10] for row in rows})
    return f"{where}; {packages}; commit {commits}; {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def commits_of(rows: list[dict]) -> list[str]:
    return sorted({row["commit"] or "unknown" for row in store.measured(rows)})


def targets(rows: list[dict], devices: tuple[str, ...] = ("gpu", "cpu")) -> str:
    """The targets' table, each filled from the rows or "not measured"."""
    lines = []
    for target in TARGETS:
        if target.device not in devices:
            continue
        found = values(target, rows)
        shown = ", ".join(f"{_number(target, value)} ({shape})" for shape, value in found)
        verdict = ""
        if found:
            verdict = "met" if all(target.met(value) for _, value in found) else "**missed**"
        lines.append([target.what, target.wanted, shown or NOT_MEASURED, verdict])
    return table(["what", "target", "measured", ""], lines)


def _number(target, value: float) -> str:
    if target.is_count:
        return f"{value:.0f}"
    return f"{value:.1%}" if target.measure in ("share", "memory") else f"{value:.2f}×"


def groups_of(rows: list[dict], kind: str, step: str | None = None) -> list[dict[str, dict]]:
    """The measured groups of a kind, in the order of their shapes."""
    found = [group for group in store.groups(store.measured(rows)).values() if first(group)["kind"] == kind]
    return sorted((group for group in found if step in (None, first(group)["step"])), key=_size)


def _size(group: dict[str, dict]) -> list[int]:
    """A shape's place: by its narrower width, then the rest."""
    row = first(group)
    return [min(row.get("d_in") or 0, row.get("d_out") or 0), *(row.get(name) or 0 for name in store.SHAPE)]


def first(group: dict[str, dict]) -> dict:
    return next(iter(group.values()))


def layers(rows: list[dict], kind: str = "layer", without: tuple[str, ...] = ()) -> str:
    """Providers by shapes: time over the base variant and over peft LoRA r=8 (fp32 adapters), and on a GPU the time."""
    groups, gpu = groups_of(rows, kind), is_gpu(rows)
    if not groups:
        return f"{NOT_MEASURED}\n"
    names = [name for name in dict.fromkeys(name for group in groups for name in group) if name not in without]
    head = ["provider", *(f"{first(g)['d_in']}→{first(g)['d_out']}" for g in groups)]
    lines = []
    for name in names:
        cells = [f"**{name}**" if name.startswith("MoS") else name]
        for group in groups:
            row = group.get(name)
            if row is None:
                cells.append("")
                continue
            over = [
                f"{row['median_s'] / group[b]['median_s']:.2f}" for b in (row["base"], providers.PEFT_8) if b in group
            ]
            cells.append(" / ".join(([duration(row["median_s"])] if gpu else []) + over))
        lines.append(cells)
    return table(head, lines)


def memory(rows: list[dict], kind: str = "layer") -> str:
    """Peak beyond the frozen layer's, MB, and bytes a token saved for backward beyond x and the parameters."""
    groups = groups_of(rows, kind)
    if not groups:
        return f"{NOT_MEASURED}\n"
    names = list(dict.fromkeys(name for group in groups for name in group))
    head = ["provider"]
    for group in groups:
        shape = f"{first(group)['d_in']}→{first(group)['d_out']}"
        head += [f"{shape}: peak beyond frozen, MB", "saved, bytes a token"]
    lines = []
    for name in names:
        cells = [name]
        for group in groups:
            row, base = group.get(name, {}), group.get(providers.FROZEN, {})
            peak = (
                f"{(row['peak_bytes'] - base['peak_bytes']) / 1e6:.1f}"
                if "peak_bytes" in row and "peak_bytes" in base
                else ""
            )
            saved = f"{row['saved_bytes'] / row['tokens']:.0f}" if "saved_bytes" in row else ""
            cells += [peak, saved]
        lines.append(cells)
    return table(head, lines)


def ffns(rows: list[dict]) -> str:
    """Every measured FFN: times, and what one forward and backward saves, takes at its peak and launches.

    Over the frozen FFN, and over peft LoRA r=8.
    """
    groups, gpu = groups_of(rows, "ffn"), is_gpu(rows)
    if not groups:
        return f"{NOT_MEASURED}\n"
    parts = []
    for group in groups:
        row = first(group)
        counts = ["launches", "of these ours", "host"] if gpu else ["operations of PyTorch's"]
        head = [f"{row['d_in']}→{row['d_out']}, {row['tokens']} tokens", *(["time"] if gpu else []), "over frozen",
                "over peft LoRA", "saved, MB", "peak, MB", *counts]  # fmt: skip
        lines = []
        for name, row in group.items():
            over = [
                f"{row['median_s'] / group[b]['median_s']:.2f}" if b in group else ""
                for b in (row["base"], providers.PEFT_8)
            ]
            bytes_of = [f"{row[n] / 1e6:.1f}" if n in row else "" for n in ("saved_bytes", "peak_bytes")]
            if gpu:
                host = duration(row["host_s"]) if "host_s" in row else ""
                counted = [str(row.get("device_launches", "")), str(row.get("launches", "")), host]
            else:
                counted = [str(row.get("operations", ""))]
            shown = f"**{name}**" if name.startswith("MoS") else name
            shown = "frozen FFN, as transformers runs it" if name == providers.FROZEN else shown
            lines.append([shown, *([duration(row["median_s"])] if gpu else []), *over, *bytes_of, *counted])
        title = "" if row["step"] == "forward+backward" else f"With the {row['step'].split(', ')[1]} for this GPU:\n\n"
        parts.append(title + table(head, lines))
    return "\n\n".join(parts)


FFN_NOTE = (
    "Times{} and the peak of memory above what was allocated before are measured. The bytes saved for backward are "
    "counted: each storage once, with x if it is kept, without the parameters. {} “Linear by linear” is the same MoS "
    "FFN with its linears called one after the other."
)


def ffn_note(rows: list[dict]) -> str:
    """The note on the FFNs' table: what is measured, and what is counted."""
    if is_gpu(rows):
        return FFN_NOTE.format(", the host's time until the call returns,", "Launches are those of torch's profiler.")
    return FFN_NOTE.format("", "The last column counts the operations that PyTorch dispatches, without views.")


def launches(rows: list[dict]) -> str:
    """Our own kernels' launches in forward and backward, by provider, where there are any."""
    found = {r["provider"]: r["launches"] for r in store.measured(rows) if r["kind"] == "layer" and r.get("launches")}
    return "Launches of our kernels, forward and backward: " + ", ".join(f"{n} {c}" for n, c in found.items()) + "."


def settings_found(rows: list[dict]) -> str:
    """What the tuner found, by kernel."""
    found = [row for row in rows if row["kind"] == "tune" and row["status"] == "ok"]
    return "\n".join(f"- {row['provider']}: {row['message']}" for row in found) or f"{NOT_MEASURED}\n"


def shares(rows: list[dict], kind: str = "steps") -> str:
    """Every step with its bytes, FLOP, share of the ceiling, and on a GPU its time."""
    groups, gpu = groups_of(rows, kind), is_gpu(rows)
    if not groups:
        return f"{NOT_MEASURED}\n"
    lines = []
    for group in groups:
        for name, row in group.items():
            base = group.get(row["base"])
            shape = f"{row['d_in']}→{row['d_out']}, T={row['tokens']}"
            over = f"{row['median_s'] / base['median_s']:.3f}" if base else ""
            cells = [shape, row["step"] if kind == "steps" else name]
            if gpu:
                cells.append(duration(row["median_s"]))
            cells += [over, f"{row['bytes'] / 1e6:.1f}", f"{row['flop'] / 1e9:.2f}"]
            lines.append([*cells, f"{row['share_of_ceiling']:.0%} of {row['ceiling']}"])
    head = ["shape", "step" if kind == "steps" else "provider", *(["time"] if gpu else [])]
    return table([*head, "over the base", "MB", "GFLOP", "share of the ceiling"], lines)


def by_axis(rows: list[dict], kind: str, axis: str, step: str | None = None) -> str:
    """Providers by the values of an axis, each over the group's base."""
    groups, gpu = groups_of(rows, kind, step), is_gpu(rows)
    if not groups:
        return f"{NOT_MEASURED}\n"
    names = list(dict.fromkeys(name for group in groups for name in group))
    label = (lambda row: f"{row['d_in']}→{row['d_out']}") if axis == "width" else (lambda row: str(row[axis]))
    lines = []
    for name in names:
        cells = [name]
        for group in groups:
            row = group.get(name)
            base = group.get(first(group)["base"])
            if row is None or base is None:
                cells.append("" if row is None or not gpu else duration(row["median_s"]))
                continue
            over = f"{row['median_s'] / base['median_s']:.2f}"
            cells.append(f"{duration(row['median_s'])} / {over}" if gpu else over)
        lines.append(cells)
    return table([f"{axis} =", *(label(first(group)) for group in groups)], lines)


def not_measured(rows: list[dict]) -> str:
    """What was left out, did not fit or failed, and why; a line for each group and reason."""
    found: dict[tuple, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            shape = " ".join(f"{name}={row[name]}" for name in store.SHAPE if row.get(name) is not None)
            reason = f"{row['status']}: {row['message']}" if row["message"] else row["status"]
            found.setdefault((f"{row['kind']} {row['step']}, {shape}", reason), []).append(row["provider"])
    lines = []
    for (group, reason), names in found.items():
        all_of_it = len(names) == sum(1 for row in rows if f"{row['kind']} {row['step']}, " in group) and len(names) > 6
        shown = "everything" if all_of_it else ", ".join(names)
        lines.append(f"- {group}: {shown} ({reason})")
    return "\n".join(lines) or "Nothing."
