"""What the project asks of GPU ranks, as ratios to yardsticks of the same run. METRICS.md has the formulas.

A bar belongs to (ranks, GPUs) and a configuration; without one a figure is reported only. `goal` is where a very good implementation
ends; `peer_us` the best library measured on GPUs of that kind, at any number of SMs; `most_us` what is asked in microseconds as well, on the
cards where that was said.
"""
import collections

Bar = collections.namedtuple("Bar", "yardstick bar goal peer_us most_us", defaults=(None, None, None))
P99_BARS = {"ht": 1.15, "ll": 1.3}  # times the median

H200 = "H200"


def _on_card(gpu, h100, h200):
    return h200 if H200 in gpu else h100


def _two(gpu, record):
    """Two ranks on two GPUs, 4096 tokens, hidden 7168, top-8 of 256, at most 16 SMs."""
    return {
        ("dispatch", "bf16", "window"): Bar("push", 1.13, 1.06, _on_card(gpu, 283, 258)),
        ("dispatch_cached", "bf16", "window"): Bar("push", 1.04, 1.01, _on_card(gpu, 281, 258)),
        ("dispatch", "fp8", "window"): Bar("push", 1.22, 1.13, _on_card(gpu, 169, 157)),
        ("dispatch_cached", "fp8", "window"): Bar("push", 1.08, 1.03, _on_card(gpu, 153, 140)),
        ("combine", "bf16", "caller"): Bar("push", 1.20, 1.10, _on_card(gpu, 259, 241)),
        ("combine", "bf16", "window"): Bar("gather", 1.05, 1.02, _on_card(gpu, 259, 241)),
    }.get(record) if record else None


def _shared(record):
    """Four and eight ranks on two GPUs; the yardstick is the static pattern."""
    return {
        ("dispatch_cached", "bf16", "window"): Bar("static push", 0.95),
        ("combine", "bf16", "caller"): Bar("static push", 1.02),
        ("combine", "bf16", "window"): Bar("static gather", 1.08),
    }.get(record)


def _four(record, sms):
    """Four ranks on four GPUs; the yardstick is the static pattern."""
    if sms == 10:
        return Bar("static push", 1.03) if record == ("dispatch_cached", "bf16", "window") else None
    return {
        ("dispatch", "bf16", "window"): Bar("static push", 1.05, None, 635),
        ("dispatch_cached", "bf16", "window"): Bar("static push", 1.0, None, 634),
        ("dispatch", "fp8", "window"): Bar("static push", 1.10, None, 334),
        ("dispatch_cached", "fp8", "window"): Bar("static push", 1.02, None, 333),
        ("combine", "bf16", "caller"): Bar("static push", 1.06, None, 588),
        ("combine", "bf16", "window"): Bar("static gather", 0.98, None, 588),
    }.get(record)


def _eight(record):
    """Eight ranks on eight GPUs: microseconds."""
    us = {"dispatchbf16": 841, "dispatchfp8": 454, "combinebf16": 841}.get(record[0] + record[1])
    return Bar("us", us) if us and record[2] == "window" else None


def high_throughput(about, gpu, count):
    """The bar of a figure, or None."""
    if (about["tokens"], about["hidden"], about["topk"], about["experts"]) != (4096, 7168, 8, 256):
        return None
    if not about["routing"].startswith("uniform") or about.get("beside"):
        return None
    # Two ways to route and dispatch: the bars are for either.
    record, ranks, sms = (about["op"].removesuffix("_ahead"), about["dtype"], about["memory"]), about["ranks"], about["sms"]
    if ranks == 4 and count == 4 and sms in (10, 16):
        return _four(record, sms)
    if sms != 16:
        return None
    if ranks == 2 and count == 2:
        return _two(gpu, record)
    if ranks in (4, 8) and count == 2:
        return _shared(record)
    return _eight(record) if ranks == 8 and count == 8 else None


def pair(about, gpu, count):
    """The bar of a pair in a graph, or None."""
    if (about["op"], about["mode"], about["hidden"]) != ("pair", "graph", 7168) or not about["routing"].startswith("uniform"):
        return None
    tokens, fp8, ranks = about["tokens"], about["dtype"] == "fp8", about["ranks"]
    if ranks == 2 and count == 2:
        goals = {1: 0.75, 8: 0.83, 32: 0.90, 128: 1.05 if fp8 else 1.10}
        peers = {1: _on_card(gpu, 28.2, 25.1), 8: _on_card(gpu, 28.7, 25.4), 32: _on_card(gpu, 30.1, 26.8),
                 128: _on_card(gpu, 37.7, 34.4)} if fp8 else {}
        bars = {1: 0.95, 8: 1.00, 32: 1.10, 128: 1.28}
        return Bar("steps", bars[tokens], goals[tokens], peers.get(tokens)) if tokens in bars else None
    if ranks in (4, 8) and count == 2:
        return Bar("steps", 1.35) if tokens in (1, 8) else None
    if ranks == 4 and count == 4:
        bars = {1: 1.0, 8: 1.05, 32: 1.10, 128: 0.96 if fp8 else 1.0}
        peers = {1: (26.4, 27.0), 8: (28.5, 28.6), 32: (33.3, 34.0), 64: (40.1, 43.4), 128: (53.3, 62.7), 256: (81.7, 101.1)}
        most_us = {1: (11.8, 12.9), 8: (12.9, 14.0), 32: (20.6, 20.9), 64: (27, 31), 128: (38, 43.4), 256: (64, 78)}
        wire = 0 if fp8 else 1
        return Bar("steps", bars.get(tokens), None, peers[tokens][wire],
                   most_us[tokens][wire] if H200 in gpu else None) if tokens in peers else None
    return Bar("us", 52) if ranks == 8 and count == 8 and tokens == 128 and fp8 else None
