"""What makes tokens: the protocol, the native engine under it, and the Core that serves one."""
