"""What the shells over the training frameworks share; no framework is imported here.

May import `audit` and everything below it; only `huggingface` and `lightning` import it. Nothing here is
public.
"""

__all__: list[str] = []
