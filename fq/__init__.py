"""Feature quantisation for GAN discriminators (Zhao et al., ICML 2020).

``FeatureQuantize`` is the layer, ``attach`` puts it into a discriminator you already have, ``suggest`` says
where.
"""

from fq import stats
from fq.attach import Handle, attach, handle_of
from fq.options import CodebookOptions
from fq.quantize import FeatureQuantize, FQOutput
from fq.search import nearest
from fq.suggest import suggest

__all__ = [
    "CodebookOptions",
    "FQOutput",
    "FeatureQuantize",
    "Handle",
    "attach",
    "handle_of",
    "nearest",
    "stats",
    "suggest",
]
