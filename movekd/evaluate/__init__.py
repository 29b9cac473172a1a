"""Questions in, answers and figures out, for a model that `movekd train` made."""
