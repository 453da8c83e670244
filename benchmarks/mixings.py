"""What each mixing makes of random coefficients: how many pictures are true fusions of held-out pairs.

    python benchmarks/mixings.py                 the pairs and mixings of recipes/toy/fuse-mixing.yaml, 12 pictures each
    python benchmarks/mixings.py --pairs 6

Nothing learns here and nothing is selected. A mixing of one share a picture gets shares that are even in [0, 1], one of
many coefficients gets each of them so. `recipes/toy/fuse-mixing.yaml` compares the same mixings under RMLer's policy.
"""

import argparse
from collections import Counter
from statistics import fmean

import torch

from pixrl import config as recipes
from pixrl.data.pairs import parse_pairs
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.world import FusionSession, load_world
from pixrl.metrics.true_fusion import FusionVerdict
from pixrl.types import sample_seed
from studies.fusion_runs import StudyConfig

STUDY = "toy/fuse-mixing"
SEED = 11


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20, help="how many of the study's pairs")
    parser.add_argument("--pictures", type=int, default=12, help="of each pair and mixing")
    given = parser.parse_args()
    study = recipes.load(StudyConfig, STUDY, kind="fuse-study")
    pairs = parse_pairs(study.pairs).pairs[: given.pairs]
    world = load_world(*study.recipe(next(study.tasks())).world)
    columns = ["pairs with any", "best balance, mean", *(str(one) for one in FusionVerdict)]
    print(f"{len(pairs)} held-out pairs, {given.pictures} pictures each")
    print(f"| mixing | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, changed in study.variants.items():
        generator = torch.Generator().manual_seed(SEED)
        verdicts: Counter[FusionVerdict] = Counter()
        best = []
        for row, concepts in enumerate(pairs):
            recipe = {"concepts": concepts, "mixing": changed["mixing"]}
            session = FusionSession(world, recipes.load(FuseConfig, recipe))
            share = torch.rand(given.pictures, 1, session.task().columns, generator=generator)
            seeds = [sample_seed(SEED, 0, row, n) for n in range(given.pictures)]
            truths = session.judge(session.render(torch.cat((share, 1 - share), dim=1), seeds))
            verdicts.update(truth.verdict for truth in truths)
            best.append(max(truth.balance for truth in truths))
        drawn = len(pairs) * given.pictures
        figures = [fmean(one > 0 for one in best), fmean(best)]
        figures += [verdicts[one] / drawn for one in FusionVerdict]
        print(f"| {name} | {' | '.join(f'{one:.2f}' for one in figures)} |", flush=True)


if __name__ == "__main__":
    main()
