"""What the searches in Python have in common: each case names the verdict that it wants."""


def run_cases(name, cases, search):
    """`search(case).run()` gives (verdict, states). Prints a line per case, as run.py reads it. @return whether any is wrong"""
    bad = 0
    for case in cases:
        got, states = search(case).run()
        bad += got != case.want
        verdict = "pass" if got == case.want else f"FAIL (want {case.want})"
        print(f"{verdict}  {got:11} {states:8} states  {name}: {case.title()}", flush=True)
    return bad != 0
