// Keeps a peer that hangs up from ending the process: see gloo_peer_name.cc.
#ifndef HW_WORKER_GLOO_PEER_NAME_H_
#define HW_WORKER_GLOO_PEER_NAME_H_

namespace headwater {

// Whether Gloo calls what this file defines in place of its own. A program that calls this has it linked in.
bool GlooToleratesLostPeers();

}  // namespace headwater

#endif  // HW_WORKER_GLOO_PEER_NAME_H_
