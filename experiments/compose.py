"""Thousands of random compositions, each judged by two oracles; see tests/compositions.py.

python experiments/compose.py --cases 3000 --seed 1
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

import compositions


def main():
    """Judge as many cases as asked for; what is wrong is printed as it is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="the same seed, the same cases")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of them")
    parser.add_argument("--only", type=int, help="one case of them, with its whole traceback")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*past_key_values. is deprecated", FutureWarning)
    if given.only is not None:
        case, _ = compositions.draw(given.seed, given.only)
        print(compositions.describe(case))
        print(compositions.judge(case) or "right")
        return
    start = time.process_time()

    def tell(number, wrong):
        text = compositions.describe(compositions.draw(given.seed, number)[0])
        print(f"{number}: {wrong}\n    {text}", flush=True)

    tally = compositions.run(given.seed, range(given.first, given.first + given.cases), tell)
    print(
        f"{given.cases} cases: {tally.right} right, {tally.refused} refused, "
        f"{len(tally.faults)} wrong; {time.process_time() - start:.0f} s of one core"
    )
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
