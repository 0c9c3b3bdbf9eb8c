"""A reasoning parser whose marks a tiny target writes by itself. vLLM imports this file by its
path, as ``reasoning_parser_plugin``."""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser


@ReasoningParserManager.register_module("parentheses")
class Parentheses(BaseThinkingReasoningParser):
    """Reasoning ends with a closing parenthesis."""

    start_token = "("
    end_token = ")"
