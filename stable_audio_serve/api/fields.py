"""Field types shared by the request models of several dialects."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

NOT_BLANK = r"\S"

PEAKS_DESCRIPTION = (
    "Extension: limit = a limiter holds peaks at 0.977 and leaves quieter clips unchanged; "
    "scale = divide by the clip's own peak; clip = cut off at full scale. Null = the server's default."
)
Finite = Annotated[float, Field(allow_inf_nan=False)]
Prompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=100_000),
    Field(json_schema_extra={"pattern": NOT_BLANK}),
]
