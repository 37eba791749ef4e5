"""Every way the agent says no, with its exit code. Each message is one sentence for the person at the device."""

from __future__ import annotations


class AgentError(Exception):
    """The model that answered before answers again, unless the class says otherwise."""

    code = 1
    meaning = "something unforeseen"


class NotTrusted(AgentError):
    code = 3
    meaning = "not signed by whom this device trusts"


class Damaged(AgentError):
    code = 4
    meaning = "the file is damaged, or no update file"


class NotForThisDevice(AgentError):
    code = 5
    meaning = "not for this device: another model, or another base"


class NotNewer(AgentError):
    code = 6
    meaning = "not newer than what this device has had"


class NoRoom(AgentError):
    code = 7
    meaning = "the disk has no room for it"


class NoAnswer(AgentError):
    code = 8
    meaning = "the new version did not answer; the one before it answers again"


class Silent(AgentError):
    code = 9
    meaning = "nothing answers; where there was a new version, the one before it is in place again"


class Busy(AgentError):
    code = 10
    meaning = "another agent is at work"


class NothingBefore(AgentError):
    code = 11
    meaning = "there is no version to go back to"


class DiskFault(AgentError):
    code = 12
    meaning = "the disk reports an error, or gives back other bytes than were written"


class Unready(AgentError):
    code = 13
    meaning = "the device's own settings or programs do not allow it"


ALL = (
    NotTrusted, Damaged, NotForThisDevice, NotNewer, NoRoom, NoAnswer, Silent, Busy, NothingBefore, DiskFault, Unready,
)  # fmt: skip
