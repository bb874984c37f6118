"""BiLLM (Huang et al., 2024), and its N:M variants of STBLLM's Table 2."""

from torch import Tensor

from subbit.binarize.spbo import Part, binarize_part
from subbit.linalg import BlockView
from subbit.methods.grouped import GroupedMethod, GroupedOptions, When

__all__ = ["BiLLM", "BiLLMOptions"]


class BiLLMOptions(GroupedOptions):
    """Options of BiLLM.

    `mask_first` prunes the whole weight by the N:M mask of the original weights and binarises
    what is left; without it every block chooses its mask when its turn comes and the rest of the
    weight makes up for what was pruned.
    """

    mask_first: bool = True


class BiLLM(GroupedMethod):
    """Residual binarisation of salient columns, bell-shaped split of the other weights.

    As printed: levels are `+-alpha` without a mean, and salient columns and split point are
    searched on the weights. The published code subtracts a mean in every pass and searches on the
    score matrix (docs/differences.md).
    """

    name = "billm"
    paper = "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs"
    year = 2024
    summary = "salient columns in two sign planes, the other weights in two groups by size"
    Opt = BiLLMOptions
    options: BiLLMOptions

    @property
    def when(self) -> When:
        return "before" if self.options.mask_first else "inside"

    @property
    def mean(self) -> bool:
        return self.options.published

    def _fit(self, block: BlockView, columns: Tensor, support: Tensor, planes: int) -> Part:
        means = planes if self.mean else 0
        return binarize_part(block.W[:, columns], support, planes, means=means)
