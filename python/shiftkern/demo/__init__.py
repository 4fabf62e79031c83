"""Runnable demonstrations behind ``shiftkern demo``. They need ``pip install 'shiftkern[demo]'``."""
