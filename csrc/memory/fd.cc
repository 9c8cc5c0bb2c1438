#include "memory/fd.h"

#include <cerrno>
#include <cstring>
#include <sys/socket.h>

#include "base/error.h"

namespace pyar {

Sent try_send_message(const Fd& socket, const void* message, size_t bytes, int attached) {
  iovec part{const_cast<void*>(message), bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (attached >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &attached, sizeof attached);
  }
  ssize_t sent;
  do sent = sendmsg(socket.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (sent < 0 && errno == EINTR);
  if (sent >= 0) return Sent::kYes;
  if (errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN) return Sent::kClosed;
  // The receiver's queue is full (ten messages by default), or too many descriptors are under way.
  if (errno == EAGAIN || errno == ENOBUFS || errno == ETOOMANYREFS) return Sent::kNoRoom;
  throw_errno("cannot send to a rank of this host");
}

bool try_receive_message(const Fd& socket, void* message, size_t capacity_bytes,
                         Received& received) {
  iovec part{message, capacity_bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  ssize_t got;
  do {
    header.msg_control = control;
    // Room for one descriptor and no padding, where a second one would fit: the kernel closes it.
    header.msg_controllen = CMSG_LEN(sizeof(int));
    got = recvmsg(socket.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    // A peer that ended without reading all resets the connection; what it had sent comes after.
  } while (got < 0 && (errno == EINTR || errno == ECONNRESET));
  if (got < 0) {
    if (errno == EAGAIN) return false;
    throw_errno("cannot receive from a rank of this host");
  }
  received = {static_cast<size_t>(got), Fd()};
  const cmsghdr* rights = CMSG_FIRSTHDR(&header);
  if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS &&
      rights->cmsg_len == CMSG_LEN(sizeof(int))) {
    int attached;
    std::memcpy(&attached, CMSG_DATA(rights), sizeof attached);
    received.attached = Fd(attached);
  }
  if (header.msg_flags & MSG_TRUNC)
    throw Error("a rank of this host sent a message that is too long; do the versions differ?");
  return true;
}

}  // namespace pyar
