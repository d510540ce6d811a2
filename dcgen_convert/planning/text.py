"""A plan document as text for people. Every number stands beside its basis."""

from __future__ import annotations

import textwrap

from dcgen_convert.core.progress import duration
from dcgen_convert.planning.licences import lines as licence_lines

WIDTH = 100  # columns of the tables of a plan, and of what their figures rest on


def size(value: float | None) -> str:
    """Bytes for people, in decimal units as disks are sold."""
    if value is None:
        return "unknown size"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


def render(doc: dict) -> str:
    """The plan in sections: what, speed, memory, disk, downloads, time, settings, and what stands in the way."""
    source, ae, chosen = doc["source"], doc["autoencoder"], doc["memory"]["chosen"]
    networks = f"{source['networks']} networks of " if source["networks"] > 1 else ""
    lines = [
        f"{source['name']} ({source['family']}, {networks}{source['parameters']:,} parameters, "
        f"f{source['f']}c{source['c']} patch {source['p']})"
        f" -> {ae['name']} (f{ae['f']}c{ae['c']} patch 1)",
        "",
    ]
    for row in doc["tokens"]:
        frames = f" and {row['frames']} frames ({row['latent_frames']} latent frames)" if "frames" in row else ""
        counts = f"{row['before']:,} -> {row['after']:,} ({row['ratio']:g} x fewer)"
        lines.append(f"tokens at {row['resolution']} px{frames}: {counts}")
        lines += _buckets(row.get("buckets", []))
    lines.append(doc["alignment"]["told"])
    speed, paper = doc["speedup"], doc["speedup_paper"]
    lines.append(f"speed-up of a step at {speed['resolution']} px: {speed['value']:.1f} x  [{speed['basis']}]")
    if paper:
        lines.append(f"speed-up in the paper: {paper['value']:g} x  [{paper['basis']}]")
    training = doc["training"]
    lines += [
        "",
        f"trained: {training['trained']:,} of {training['parameters']:,} parameters "
        f"({training['lora_linears']} LoRA linears)",
        *_wrapped(
            f"memory per GPU: {chosen['total']:.1f} GiB of {doc['memory']['gpu_gib']:g} with "
            f"ZeRO-{chosen['zero']}, offload {chosen['offload']}, "
            f"{chosen['gpus']} GPU(s), micro-batch {chosen['micro_batch']} (at most {chosen['max_micro_batch']})"
        ),
        f"  why: {chosen['reason']}",
        *_wrapped(f"[{doc['memory']['basis']}]", "  "),
        *_memory_table(doc["memory"]["table"]),
        *_stages_memory(doc["memory"]["stages"]),
        "",
        *_quantization(doc["quantization"]),
        *_wrapped(
            f"disk at the peak, with keep {doc['disk']['keep']}: {size(doc['disk']['peak'])}  [{doc['disk']['basis']}]"
        ),
        *_wrapped(", ".join(f"{kind} {size(value)}" for kind, value in doc["disk"]["bytes"].items() if value), "  "),
    ]
    for row in doc["downloads"]:
        state = "in the cache" if row["cached"] else "gated" if row["gated"] else "open"
        lines.append(f"download {row['role']}: {row['repo']} {size(row['bytes'])} ({state})")
    lines += ["", *_budget(doc["budget"]), *bill_lines(doc["time"]), "", "settings (value, from):"]
    width = max(map(len, doc["settings"]))
    lines += [f"  {key:<{width}}  {item['value']!s:<20}  {item['origin']}" for key, item in doc["settings"].items()]
    lines += ["", *licence_lines(doc["licences"])]
    lines += [f"note: {note}" for note in doc["notes"]] + [f"problem: {problem}" for problem in doc["problems"]]
    return "\n".join([*lines, f"verdict: {doc['status']}"])


def _buckets(rows: list[dict]) -> list[str]:
    """Every bucket with the tokens of the converted model."""
    if not rows:
        return []
    shown = ", ".join(f"{row['height']}x{row['width']}={row['after']:,}" for row in rows)
    return _wrapped(f"{len(rows)} buckets, height x width in px and tokens after: {shown}", "  ")


def _wrapped(text: str, indent: str = "") -> list[str]:
    """``text`` in lines of WIDTH columns; all but the first are indented by two more."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _quantization(part: dict | None) -> list[str]:
    if part is None:
        return []
    how = f"rank {part['rank']}" if part["rank"] else "without a branch"
    lines = [f"quantised: {part['w4a4']} linears W4A4 {part['format']} {how}, {part['w4a16']} W4A16"]
    lines += [f"  {name}: {reason}" for kind in ("dense", "impossible") for name, reason in part[kind].items()]
    return [*lines, *_containers(part["containers"]), ""]


def _containers(found: dict[str, dict]) -> list[str]:
    """What each container of 4-bit weights can hold of the model."""
    lines = [f"  {'container':<10}{'W4A4':>6}{'W4A16':>7}{'cannot hold':>13}{'weights in 4 bits':>19}"]
    for name, held in found.items():
        if "problem" in held:
            lines += _wrapped(f"{name:<10}   {held['problem']}", "  ")
        else:
            numbers = f"{held['w4a4']:>6}{held['w4a16']:>7}{held['impossible']:>13}{held['share']:>19.0%}"
            lines.append(f"  {name:<10}{numbers}")
    return lines


def _memory_table(rows: list[dict]) -> list[str]:
    cards = [key.removeprefix("max_micro_batch_") for key in rows[0] if key.startswith("max_micro_batch_")]
    head = f"  {'ZeRO / offload':<15}{'GPUs':>5}{'weights':>8}{'grads':>6}{'optim':>6}{'act':>6}{'step':>6}"
    head += f"{'other':>6}{'total':>6}{'host':>6}"
    lines = [
        "  in GiB, with one picture per pass; mb: the largest micro-batch that fits",
        head + "".join(f"  mb {card}" for card in cards),
    ]
    for row in rows:
        name = f"{row['zero']}" + ("" if row["offload"] == "none" else f" + {row['offload']}")
        numbers = f"{row['gpus']:>5}{row['weights']:>8.1f}{row['grads']:>6.1f}{row['optimizer']:>6.1f}"
        numbers += (
            f"{row['activations']:>6.2f}{row['step']:>6.1f}{row['other']:>6.1f}{row['total']:>6.1f}{row['host']:>6.1f}"
        )
        lines.append(
            f"  {name:<15}{numbers}" + "".join(f"{row[f'max_micro_batch_{card}']:>{5 + len(card)}}" for card in cards)
        )
    return lines


def _stages_memory(rows: list[dict]) -> list[str]:
    """Memory of every stage, per rank."""
    lines = [f"  {'memory per rank':<17}{'GPU':>11}{'host':>11}  pictures at once"]
    for row in rows:
        gpu = f"{row['gpu_gib']:.1f} GiB" if row["gpu_gib"] else ""
        host = f"{row['host_gib']:.1f} GiB"
        lines.append(f"  {row['stage']:<17}{gpu:>11}{host:>11}  {row['at_once']}  ({row['basis']})")
    return lines


def _budget(budget: dict) -> list[str]:
    """What follows from the budget, and why."""
    if not budget["derivation"]:
        return []
    return ["budget:", *(f"  {line}" for line in budget["derivation"]), ""]


def bill_lines(time: dict) -> list[str]:
    """The bill: wall-clock with its range, GPU-hours, and what each stage spends it on."""
    gpus, price = time["gpus"], f", about {time['price_usd']:,.0f} USD" if time["price_usd"] else ""
    one = time["device"] == "2 CPU cores"
    where = time["device"] if one else f"{gpus} x {time['device']}"
    hours = "" if one else f", {time['gpu_hours']:,.0f} GPU-hours{price}"
    alone = "" if gpus == 1 else " on one GPU" if time["price_usd"] else " in one process"  # a CPU costs nothing
    lines = [
        f"time on {where}: {_span(time)}{hours}",
        *_wrapped(f"[{time['basis']}]", "  "),
    ]
    table = [("stage", "wall-clock", "range", "of which")]
    for row in time["stages"]:
        span = f"{_hours(row['wall_hours_low'])} to {_hours(row['wall_hours_high'])}"
        table.append((row["stage"], _hours(row["wall_hours"]), span, _parts(row, alone)))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        start = f"  {line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:<{widths[2]}}  "
        first, *more = textwrap.wrap(line[3], max(40, WIDTH - len(start))) or [""]
        lines += [start + first, *(" " * len(start) + part for part in more)]
    return lines


def _span(time: dict) -> str:
    low, high = _hours(time["wall_hours_low"]), _hours(time["wall_hours_high"])
    return f"{_hours(time['wall_hours'])} ({low} to {high})"


def _hours(value: float) -> str:
    return duration(value * 3600)


def _parts(row: dict, alone: str) -> str:
    """The kinds of work that take a twentieth of the stage or more, longest first; ``alone``: said of unshared work."""
    parts = sorted(row["work"], key=lambda part: -part["wall_hours"])
    shown = [part for part in parts if part["wall_hours"] >= 0.05 * row["wall_hours"]]
    return ", ".join(
        f"{part['what']} {_hours(part['wall_hours'])}{'' if part['shared'] else alone}"
        f"{' (measured)' if part['basis'] == 'measured' else ''}"
        for part in shown
    )
