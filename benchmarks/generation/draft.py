"""Whether a draft model pays: the same texts with it and without, in turns; the last line is one JSON object.

python benchmarks/generation/draft.py MODEL DRAFT_MODEL [--quantize auto --temperature 0.8 --tokens 128 --rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from peer import forget

from smolforge.config import THREE_PROMPTS
from smolforge.generation import Engine, SamplingParams


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("draft")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    engines = {
        name: Engine.from_pretrained(args.model, quantize=args.quantize, draft=draft)
        for name, draft in (("alone", None), ("drafted", args.draft))
    }
    drafted = engines["drafted"]
    for decision in drafted.decisions:
        print(decision, file=sys.stderr)
    if drafted.speculation is None or drafted.speculation.draft is None:
        print("error: the draft is not used here", file=sys.stderr)
        return 1
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.rounds + 1):  # the first warms up
        texts = []
        sampling = SamplingParams(temperature=args.temperature, max_tokens=args.tokens, seed=turn, ignore_eos=True)
        for name, engine in engines.items():
            forget(engine)
            began = time.perf_counter()
            texts.append([[s.token_id for s in engine.stream([prompt], sampling)] for prompt in THREE_PROMPTS])
            if turn:
                seconds[name].append(time.perf_counter() - began)
        if texts[0] != texts[1]:
            print("error: the draft changed the text", file=sys.stderr)
            return 1
    rate = {name: len(THREE_PROMPTS) * args.tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [a / d for a, d in zip(seconds["alone"], seconds["drafted"], strict=True)]
    cost = drafted.speculation.cost
    print(json.dumps({
        "tokens_per_second": {name: round(value, 1) for name, value in rate.items()},
        "drafted_over_alone": round(statistics.median(ratios), 3),
        "drafted": drafted.speculation.proposed, "accepted": drafted.speculation.accepted,
        "cost_by_bytes": round(cost.bytes_ratio, 3), "cost_now": round(cost.value, 3),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
