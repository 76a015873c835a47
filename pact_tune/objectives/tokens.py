"""The safety tokens of a run: where they come from, and that they belong to its model."""

from dataclasses import dataclass

from pact_tune.errors import UserError
from pact_tune.hub import NotPublishedError
from pact_tune.objectives.base import Context
from pact_tune.safety_tokens import SafetyTokens, safety_tokens_from_templates


@dataclass(frozen=True)
class TokenSource:
    """Where the safety tokens of a run come from.

    Attributes:
        source (str): folder, Hub repository or known name.
        revision (str | None): of the Hub repository.
        subfolder (str | None): of the folder or repository.
        template_fallback (bool): take tokens from refusal templates where nobody has published a known name's.
    """

    source: str
    revision: str | None = None
    subfolder: str | None = None
    template_fallback: bool = False

    def load(self, context: Context) -> tuple[SafetyTokens, str]:
        """The safety tokens, checked against the run's model, and a line for the log.

        Args:
            context (Context): of the run.

        Returns:
            tuple[SafetyTokens, str]: all that the source holds, and which they are.

        Raises:
            UserError: not found, damaged, of another tokenizer, or past the vocabulary.
        """
        tokens, own = self._find(context)
        tokens.check_vocabulary(context.vocab_size)
        tokens.check_tokenizer(context.tokenizer)
        if context.weights_hash is not None:
            tokens.check_model(context.weights_hash)
        if own:
            return tokens, f"of '{self.source}' ({tokens.provenance['method']})."
        return tokens, (
            f"of refusal templates. WARNING: nobody has published safety tokens for '{self.source}' "
            "(loss.template_fallback); these weights were not measured."
        )

    def _find(self, context: Context) -> tuple[SafetyTokens, bool]:
        try:
            return SafetyTokens.load(self.source, revision=self.revision, subfolder=self.subfolder), True
        except NotPublishedError as error:
            if not self.template_fallback:
                raise UserError(
                    f"{error}; or use tokens from refusal templates, loss.template_fallback=True."
                ) from error
            return safety_tokens_from_templates(context.tokenizer), False
