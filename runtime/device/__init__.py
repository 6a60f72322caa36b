"""Running a bundle in a device's memory: buffers, one stream, and engines that are handed addresses."""
