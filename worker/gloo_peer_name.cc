// Gloo (0.0~git20220518, gloo/transport/tcp/pair.cc, handleConnecting()) asks for the name of a peer that it
// has just connected to, on its event thread. Where the peer has reset the connection by then the answer is
// ENOTCONN, Address::fromPeerName() throws, nothing catches that, and the process ends. The definition below
// does not throw. The library calls that function through its procedure linkage table, and the dynamic linker
// takes a program's definition before a library's; the connection is then found broken when it is read.
#include "worker/gloo_peer_name.h"

#include "gloo/transport/tcp/address.h"
#include <dlfcn.h>
#include <netinet/in.h>
#include <sys/socket.h>

namespace gloo::transport::tcp {

Address Address::fromPeerName(int fd) {
  sockaddr_storage name{};
  socklen_t bytes = sizeof name;
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&name), &bytes) != 0) {
    name = {};
    name.ss_family = AF_INET;  // 0.0.0.0:0, for messages
  }
  return Address(name);
}

}  // namespace gloo::transport::tcp

namespace headwater {

bool GlooToleratesLostPeers() {
  const auto own = &gloo::transport::tcp::Address::fromPeerName;
  return dlsym(RTLD_DEFAULT, "_ZN4gloo9transport3tcp7Address12fromPeerNameEi") ==
         reinterpret_cast<void*>(own);
}

}  // namespace headwater
