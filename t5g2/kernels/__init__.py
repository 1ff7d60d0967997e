"""One function per hot spot; the reference implementation first, then the back ends."""
