"""What hypothesis draws in more than one module."""

from hypothesis import strategies as st

_short = st.text(max_size=4)

#: Any JSON value, also with NaN and surrogates, which Python's `json` lets through.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _short,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_short, inner, max_size=3),
    max_leaves=8,
)
