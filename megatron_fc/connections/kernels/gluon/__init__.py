"""The main kernels of Frac-Connections, in Gluon."""
