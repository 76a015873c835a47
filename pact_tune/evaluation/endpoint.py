"""A model behind an OpenAI-compatible endpoint (vLLM's server, llama.cpp's, a vendor's)."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pact_tune.conversations import Message, one_line
from pact_tune.environment import install
from pact_tune.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url (str): base address, such as ``http://localhost:8000/v1``.
        model (str): name of the model there.
        parallel (int): requests at a time.
        temperature (float): 0 is greedy.
        seed (int): sent along where answers are sampled.
        timeout (float): seconds that one request may take.
        retries (int): after 429, 5xx or a lost connection, waiting longer each time.
    """

    url: str
    model: str
    parallel: int = 8
    temperature: float = 0.0
    seed: int = 0
    timeout: float = 600.0
    retries: int = 5

    def answer(self, chats: Sequence[Sequence[Message]], max_new_tokens: int) -> list[tuple[str, bool]]:
        """Answers chats.

        Args:
            chats (Sequence[Sequence[Message]]): each ends with the user's turn; the server applies its chat template.
            max_new_tokens (int): longest answer.

        Returns:
            list[tuple[str, bool]]: text, and whether the model ended its turn itself.

        Raises:
            UserError: the endpoint cannot be reached, refuses, or answers with what is no answer.
        """
        client = self._client()
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda chat: self._one(client, chat, max_new_tokens), chats))

    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise UserError(f"Endpoints need the openai package: {install('eval')}.") from error
        # Local servers want no key, but the client does.
        key = os.environ.get(KEY_VARIABLE, "none")
        return openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)

    def _one(self, client: Any, chat: Sequence[Message], max_new_tokens: int) -> tuple[str, bool]:
        import openai

        sampling = {"seed": self.seed} if self.temperature else {}
        try:
            reply = client.chat.completions.create(
                model=self.model,
                messages=list(chat),
                max_tokens=max_new_tokens,
                temperature=self.temperature,
                **sampling,
            )
        except openai.RateLimitError as error:
            raise self._error(
                f"answers 429, too many requests, after {self.retries} retries: lower --parallel, or wait"
            ) from error
        except openai.AuthenticationError as error:
            raise self._error(f"does not accept the key: set {KEY_VARIABLE}") from error
        except openai.APIStatusError as error:
            raise self._error(f"answers with status {error.status_code} ({one_line(error)})") from error
        except openai.APITimeoutError as error:
            raise self._error(
                f"did not answer within {self.timeout:g} s: give it more (--timeout), or fewer requests at a time (--parallel)"
            ) from error
        except openai.APIConnectionError as error:
            raise self._error(
                f"cannot be reached ({one_line(error)}): check that the server runs and the address"
            ) from error
        except openai.OpenAIError as error:
            raise self._error(f"gives no usable answer ({one_line(error)})") from error
        except ValueError as error:  # a body that is no JSON
            raise self._error(
                "does not answer with JSON: check that the address ends with the API's path, such as /v1"
            ) from error
        # The client passes on whatever came with status 200: a web page is a str, an error object has no choices.
        if isinstance(reply, str):
            raise self._error("answers with a web page: check that the address ends with the API's path, such as /v1")
        if not isinstance(getattr(reply, "choices", None), list) or not reply.choices:
            raise self._error("answers without any choice: check the model's name and the server's log")
        choice = reply.choices[0]
        message = getattr(choice, "message", None)
        content = getattr(message, "content", None)
        if message is None or not (content is None or isinstance(content, str)):
            raise self._error("answers with a choice that holds no message: is it a chat endpoint?")
        return content or "", getattr(choice, "finish_reason", None) == "stop"

    def _error(self, text: str) -> UserError:
        return UserError(f"The endpoint '{self.url}' {text}; what is done is kept, run again to go on.")
