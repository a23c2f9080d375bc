#!/usr/bin/env python3
"""Compares two files of records: bench/compare.py OLD.jsonl NEW.jsonl

Per figure that both hold: old and new median, and a verdict: faster, slower, or "cannot tell" when the difference is
within the spread of the process starts (or within 3 %). Exit status 1 if anything is slower.
"""
import argparse
import json
import sys

KEY = ("op", "kind", "dtype", "memory", "tokens", "hidden", "topk", "experts", "ranks", "sms", "routing", "api")
LEAST_DIFFERENCE = 0.03  # what counts as noise between runs, even when the starts agree


def read(path):
    """The last record of every figure."""
    figures = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                sys.exit(f"{path}:{number}: not JSON: {error}")
            if record.get("us_p50"):
                figures[tuple(record.get(field) for field in KEY)] = record
    return figures


def name(key):
    fields = dict(zip(KEY, key))
    parts = [fields["op"], fields["dtype"], fields["api"], fields["memory"], f"{fields['tokens']} tokens", f"{fields['ranks']} ranks"]
    return " ".join(str(part) for part in parts if part)


def verdict(old, new):
    if old.get("gpu") != new.get("gpu"):
        return "cannot tell: different machines"
    if old.get("wrong") or new.get("wrong"):
        return "cannot tell: wrong results"
    change = new["us_p50"] / old["us_p50"] - 1
    noise = max(LEAST_DIFFERENCE, old.get("spread") or 0, new.get("spread") or 0)
    if abs(change) <= noise:
        return f"cannot tell ({change:+.1%}, noise {noise:.1%})"
    return f"{'faster' if change < 0 else 'slower'} ({change:+.1%}, noise {noise:.1%})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    arguments = parser.parse_args()
    old, new = read(arguments.old), read(arguments.new)
    common = [key for key in old if key in new]
    if not common:
        sys.exit("the two files have no figure in common")
    width = max(len(name(key)) for key in common)
    slower = 0
    for key in common:
        answer = verdict(old[key], new[key])
        slower += answer.startswith("slower")
        print(f"{name(key):<{width}}  {old[key]['us_p50']:>10.1f} us  {new[key]['us_p50']:>10.1f} us  {answer}")
    for title, one, other in (("only in the first", old, new), ("only in the second", new, old)):
        alone = [key for key in one if key not in other]
        if alone:
            print(f"{title}: {len(alone)}")
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
