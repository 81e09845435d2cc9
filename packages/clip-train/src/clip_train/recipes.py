"""The training runs of the paper (2212.07143, its tables of training hyper-parameters), by name."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """What the paper changes from run to run; the rest are the defaults of TrainConfig."""

    model: str
    samples_seen: int
    batch_size: int
    lr: float
    warmup: int


# name; samples seen: samples of a (virtual) epoch x epochs; global batch; peak rate; warm-up steps
_RUNS = """
B-32-laion80m-3b      2560013280   32768  5e-4   2000
B-32-laion80m-13b    12800066400   32768  5e-4   2000
B-32-laion80m-34b    34240177620   88064  1e-3  10000
B-32-laion400m-3b     2443992504   88064  1e-3  10000
B-32-laion400m-13b   13216000000   86016  1e-3   2000
B-32-laion400m-34b   34215895056   32768  5e-4   2000
B-32-laion2b-3b       2560013280   88064  1e-3  10000
B-32-laion2b-13b     13000000000   32768  5e-4   2000
B-32-laion2b-34b     34725395968   79104  1e-3   2000
B-16-laion80m-3b      2560013280   88064  1e-3  10000
B-16-laion80m-13b    13040067645   90112  1e-3  10000
B-16-laion80m-34b    34240177620   88064  1e-3  10000
B-16-laion400m-3b     2443992504   88064  1e-3  10000
B-16-laion400m-13b   13034626688   33792  5e-4  10000
B-16-laion400m-34b   34215895056   90112  1e-3  10000
B-16-laion2b-3b       2560013280   88064  1e-3  10000
B-16-laion2b-13b     13034626670   90112  1e-3  10000
B-16-laion2b-34b     34215894963   88064  1e-3  10000
L-14-laion80m-3b      2560013280   88704  1e-3  10000
L-14-laion80m-13b    13040067645   89600  1e-3  10000
L-14-laion80m-34b    34240177620   89600  1e-3  10000
L-14-laion400m-3b     2443992504   88704  1e-3  10000
L-14-laion400m-13b   13216000000   86016  1e-3   2000
L-14-laion400m-34b   34692000000   86016  1e-3  10000
L-14-laion2b-3b       2560013280   88704  1e-3  10000
L-14-laion2b-13b     12800000000   86016  1e-3  10000
L-14-laion2b-34b     32000000000   86016  1e-3  10000
H-14-laion2b-34b     34725395968   79104  5e-4   2000
g-14-laion2b-13b     12208147020   64000  5e-4   2000
"""


def _read(line: str) -> tuple[str, Recipe]:
    name, samples_seen, batch_size, lr, warmup = line.split()
    model = "ViT-" + name[: name.index("-laion")]
    return name, Recipe(model, int(samples_seen), int(batch_size), float(lr), int(warmup))


RECIPES = dict(_read(line) for line in _RUNS.strip().splitlines())
