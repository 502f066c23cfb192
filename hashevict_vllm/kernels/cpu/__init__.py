"""The rules on CPUs, compiled by numba; entry points in `launch`."""
