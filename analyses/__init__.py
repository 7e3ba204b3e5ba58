"""Records in, labelled numbers and figures out. Numpy and xarray only; torch is never imported."""
