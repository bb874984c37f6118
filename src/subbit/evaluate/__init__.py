"""How good a model is, in numbers and in words: perplexity, generation, chat."""

from subbit.evaluate.chat import chat_loop
from subbit.evaluate.generate import generate
from subbit.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "chat_loop", "generate", "perplexity"]
