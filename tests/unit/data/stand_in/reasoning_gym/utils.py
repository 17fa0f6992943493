"""The text between tags, as in the package."""

import re


def extract_answer(completion: str, tag_name: str = "answer") -> str | None:
    found = re.findall(f"<{tag_name}>(.*?)</{tag_name}>", completion, flags=re.DOTALL)
    return found[-1].strip() if found else None
