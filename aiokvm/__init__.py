"""aiokvm: virtual machines for Linux KVM inside an asynchronous Python program."""
