"""Means over sets, as "Reproducible scaling laws" (2212.07143) and CLIP_benchmark define them.

- VTAB+ is the plain mean of top-1 over 35 sets: ImageNet and its five shifted sets, the 19 of VTAB,
  CIFAR-10, and nine more. CLIP_benchmark's list `vtab+` also names voc2007_multilabel; the paper's
  mean leaves it out.
- Three VTABs are about: of zero-shot accuracy, 19 sets with SUN397 and without CIFAR-10; of linear
  probes, 19 with CIFAR-10 and without SUN397.
- Robustness is the mean over the five shifted sets of ImageNet.

Sets are known by CLIP_benchmark's names. A mean is of all its sets or not at all.
"""

from collections.abc import Mapping, Sequence

IMAGENET = "imagenet1k"
IMAGENET_SHIFTS = ("imagenetv2", "imagenet-r", "imagenet_sketch", "objectnet", "imagenet-a")
_VTAB_18 = (
    "vtab/caltech101",
    "vtab/cifar100",
    "vtab/clevr_count_all",
    "vtab/clevr_closest_object_distance",
    "vtab/diabetic_retinopathy",
    "vtab/dmlab",
    "vtab/dsprites_label_orientation",
    "vtab/dsprites_label_x_position",
    "vtab/dtd",
    "vtab/eurosat",
    "vtab/kitti_closest_vehicle_distance",
    "vtab/flowers",
    "vtab/pets",
    "vtab/pcam",
    "vtab/resisc45",
    "vtab/smallnorb_label_azimuth",
    "vtab/smallnorb_label_elevation",
    "vtab/svhn",
)
VTAB_ZEROSHOT = (*_VTAB_18, "sun397")
VTAB_PROBE = (*_VTAB_18, "vtab/cifar10")
VTAB_PLUS = (
    IMAGENET,
    *IMAGENET_SHIFTS,
    *VTAB_ZEROSHOT,
    "vtab/cifar10",
    "cars",
    "fer2013",
    "renderedsst2",
    "voc2007",
    "fgvc_aircraft",
    "country211",
    "gtsrb",
    "stl10",
    "mnist",
)
ZEROSHOT_AVERAGES = {"VTAB+": VTAB_PLUS, "VTAB": VTAB_ZEROSHOT, "robustness": IMAGENET_SHIFTS}
PROBE_AVERAGES = {"VTAB": VTAB_PROBE}


def average(scores: Mapping[str, float], sets: Sequence[str]) -> float | None:
    """The plain mean over `sets`; None where one of them has no score."""
    if any(name not in scores for name in sets):
        return None
    return sum(scores[name] for name in sets) / len(sets)
