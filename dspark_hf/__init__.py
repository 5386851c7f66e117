"""DSpark speculative decoding for Hugging Face transformers.

import dspark_hf
head = dspark_hf.DSparkHead.from_pretrained("deepseek-ai/dspark_qwen3_4b_block7")
model.generate(**inputs, assistant_model=head)
"""

from .configuration_dspark import DSparkConfig
from .embedded import embedded_pair
from .generation.candidate_generator import DSparkCandidateGenerator
from .generation.hook import install
from .generation.stats import DSparkGenerateOutput, DSparkStats
from .heads import add_methods
from .modeling_dspark import DraftBlock, DSparkHead
from .serving.hook import install as install_batching
from .version import __version__ as __version__

__all__ = [
    "DSparkCandidateGenerator",
    "DSparkConfig",
    "DSparkGenerateOutput",
    "DSparkHead",
    "DSparkStats",
    "DraftBlock",
    "embedded_pair",
]

add_methods()
install()
install_batching()
