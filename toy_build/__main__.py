"""`python -m toy_build`: write unfinished states into build-state/, where a commit carries them to another machine."""

from pixrl.toy import CHECKPOINTS
from toy_build.training import ROOT, keep

if __name__ == "__main__":
    for path in keep(ROOT / "build" / "world", CHECKPOINTS):
        print(path.relative_to(ROOT), path.stat().st_size)
